"""`python -m loadgen`: replay a workload against any URL that answers in Tidegate's JSON, and report.

Works from outside the system: nothing but a URL is needed. `tidegate replay` and `tidegate compare` do the
same with routers and instances known.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from loadgen.console import live_progress, print_results
from loadgen.figures import RouterRun
from loadgen.payloads import PayloadError, parse_payloads
from loadgen.report import check_place, write_report
from loadgen.score import details, not_comparable, score
from loadgen.self_test import self_test
from loadgen.sender import SendOptions, run_replay
from loadgen.traces import TraceError, parse_workload, write_trace

app = typer.Typer(add_completion=False)

INTERRUPTED_EXIT = 130


@app.command()
def replay(
    url: Annotated[str, typer.Option(help="Where to POST, as http://127.0.0.1:8000/v1/digits.")] = "",
    workload: Annotated[
        str, typer.Option(help="paper, periodic, poisson:RATE, constant:RATE, or a trace as CSV.")
    ] = "poisson:20",
    payload: Annotated[
        str, typer.Option(help="digits, digits:png, digits:jpeg, emulated:BYTES, raw:BYTES, a folder or a file.")
    ] = "emulated:1000",
    split: Annotated[Path | None, typer.Option(help="JSON file that names the held-out digits.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Length; 60 s, or the trace's own.")] = None,
    rate_scale: Annotated[float, typer.Option(help="Multiplies the requests per second.")] = 1.0,
    time_scale: Annotated[float, typer.Option(help="Multiplies holding times, or a trace's length.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = 0,
    timeout_s: Annotated[float, typer.Option(help="The client gives up after this long.")] = 30.0,
    deadline_ms: Annotated[float | None, typer.Option(help="Sent as X-Deadline-Ms.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="Further header, as 'Name: value'.")] = None,
    report_phase: Annotated[bool, typer.Option(help="Tell the service the hidden phase (X-Tidegate-Phase).")] = False,
    requirement_ms: Annotated[float | None, typer.Option(help="Latency requirement, for the report.")] = None,
    name: Annotated[str, typer.Option(help="What the results are called.")] = "service",
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    save_trace: Annotated[Path | None, typer.Option(help="Write the trace that was sent as CSV.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    test_self: Annotated[
        bool, typer.Option("--self-test", help="Measure this sender: 2,000 requests/s for 5 s, no service.")
    ] = False,
) -> None:
    """Send requests when the workload says so, whatever became of earlier ones, and score the answers.

    Ctrl-C stops sending; what was sent is still reported.

    Example: python -m loadgen --url http://127.0.0.1:8000/v1/imagenet --workload poisson:100
    --payload emulated:1000 --duration-s 10 --report report.html
    """
    if test_self:
        _self_test(as_json)
        return
    if not url:
        raise typer.BadParameter("name the service: --url http://HOST:PORT/v1/SERVICE", param_hint="--url")
    try:
        check_place(report)
        headers = dict(_header(text) for text in header or [])
        payloads = parse_payloads(payload, split, seed)
        trace = parse_workload(workload, seed=seed, duration_s=duration_s, rate_scale=rate_scale, time_scale=time_scale)
        options = SendOptions(
            timeout_s=timeout_s, deadline_ms=deadline_ms, headers=headers, report_phase=report_phase, seed=seed
        )
        if save_trace:
            write_trace(save_trace, trace)
        with live_progress(name) as show:
            record = run_replay(url, trace, payloads, options, show)
    except (TraceError, PayloadError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    scores, found = score(record), details(record, requirement_ms)
    warning = not_comparable({name: record})
    run = RouterRun(name, record, scores)
    if report:
        facts = {"Sent to": url, "Workload": trace.description, "Payload": payloads.description, "Seed": str(seed)}
        title = f"{name} under {workload}"
        write_report(
            report,
            title=title,
            facts=facts,
            trace=trace,
            runs=[run],
            requirement_ms=requirement_ms,
            warning=warning,
        )
    if as_json:
        result = {"results": {name: scores}, "comparable": not warning, "warning": warning, "details": {name: found}}
        print(json.dumps(result))
    else:
        print_results([run], warning=warning)
        print(", ".join(f"{count:,} {outcome}" for outcome, count in found["outcomes"].items()))
        sending = found["sending"]
        print(
            f"sending: {sending['late']} of {found['sent']} more than {sending['late_means_over_ms']:g} ms late, "
            f"P99 {sending['p99_ms'] or 0:.2f} ms"
        )
    if record.interrupted:
        raise typer.Exit(INTERRUPTED_EXIT)


def _header(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not colon or not key.strip():
        raise ValueError(f"header {text!r}: write it as 'Name: value'")
    return key.strip(), value.strip()


def _self_test(as_json: bool) -> None:
    with live_progress("self-test") as show:
        result = self_test(on_progress=show)
    if as_json:
        print(json.dumps(result))
    else:
        sending = result["details"]["sending"]
        print(
            f"{'kept up' if result['kept_up'] else 'FELL BEHIND'}: {result['rate_per_s']:g} requests/s of 1 kB; "
            f"{result['late_share']:.2%} left over {sending['late_means_over_ms']:g} ms late "
            f"(P50 {sending['p50_ms']:.2f}, P99 {sending['p99_ms']:.2f}, max {sending['max_ms']:.2f} ms); "
            f"latency P50 {result['score']['p50_ms']:.2f}, P99 {result['score']['p99_ms']:.2f} ms"
        )
    if not result["kept_up"]:
        print("other load on this machine, or too slow a CPU: expect late senders at this rate", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
