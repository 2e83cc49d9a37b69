"""What a person at a terminal sees: a live line while a run is under way (stderr), a table afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from loadgen import sender
from loadgen.answers import Outcome
from loadgen.figures import RouterRun
from loadgen.score import unanswered

_PIPE_WIDTH = 110
_LINE_EVERY_S = 2.0
_FIRST_LINE_S = 0.5


@contextmanager
def live_progress(name: str, console: Console | None = None) -> Iterator[sender.ProgressCallback]:
    """Show one run's progress on stderr (or `console`) and give the callback that a replay calls.

    At a terminal it is one live line; in a log, a plain line every two seconds and at the end.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(name, console)
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(name, total=None, counts="")

        def show(progress: sender.Progress) -> None:
            done_s = min(progress.now_s, progress.end_s)
            bar.update(task, total=progress.end_s, completed=done_s, counts=counts_text(progress))

        yield show


def _plain_lines(name: str, console: Console) -> sender.ProgressCallback:
    due_s = _FIRST_LINE_S

    def show(progress: sender.Progress) -> None:
        nonlocal due_s
        if progress.now_s < due_s and progress.now_s < progress.end_s:
            return
        due_s = progress.now_s + _LINE_EVERY_S
        text = f"{name}: {progress.now_s:.0f} of {progress.end_s:.0f} s · {counts_text(progress)}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    return show


def counts_text(progress: sender.Progress) -> str:
    """Return one line of plain text: sent of planned, in flight, and every outcome that occurred."""
    parts = [f"{progress.sent:,}/{progress.planned:,} sent", f"{progress.in_flight} in flight"]
    parts += [f"{count:,} {Outcome(outcome).name}" for outcome, count in progress.counts.items() if count]
    return " · ".join(parts)


MEANINGS = (
    "goodput: answered correctly and in time · violations: late, refused, dropped, failed, timed out",
    "heavy: went to the largest variant · no answer: requests that stand in no latency percentile",
)


def print_results(runs: Sequence[RouterRun], title: str | None = None, warning: str = "") -> None:
    """Print the table, what its columns mean and a warning to stdout; in a pipe, wide enough for every column."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(results_table(runs, title))
    for line in MEANINGS:
        console.print(line, style="dim", markup=False)
    if warning:
        console.print(warning, style="bold red", markup=False, soft_wrap=True)


def results_table(runs: Sequence[RouterRun], title: str | None = None) -> Table:
    """Return a rich table, one line per router and, below it, one per phase. Fits into 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("router", no_wrap=True)
    for name in ("sent", "goodput", "violations", "heavy", "P50 ms", "P98", "P99"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("no answer", justify="right", min_width=len("answer"))
    for run in runs:
        missing = unanswered(run.record)
        for i, (phase, row) in enumerate(run.scores.items()):
            shares = (row["goodput_ratio"], row["violation_ratio"], row["heavy_ratio"])
            times = (row["p50_ms"], row["p98_ms"], row["p99_ms"])
            table.add_row(
                run.name if phase == "overall" else f"  {phase}",
                f"{row['requests']:,}",
                *("–" if share is None else f"{share:.2%}" for share in shares),
                *("–" if time is None else f"{time:,.1f}" for time in times),
                f"{missing[phase]:,}" if missing[phase] else "–",
                end_section=i == len(run.scores) - 1,
            )
    return table
