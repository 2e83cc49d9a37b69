"""Deployment files: what is right is read, what is wrong is named by key, value and remedy."""

from pathlib import Path

import pytest

from protocol.deployment import DeploymentError, check_deployment, few_of, read_deployment

GOOD = """
name = "x"
[services.digits]
variants = ["heavy", "light"]
requirement_ms = 250
[[workers]]
name = "a"
instances = [{ variant = "heavy" }, { variant = "light", capacity = 5, batch = [1, 3] }]
[gateway]
port = 8731
"""
WORKER = 'instances = [{ variant = "heavy" }, { variant = "light", capacity = 5, batch = [1, 3] }]'


def read(folder: Path, text: str) -> str:
    """The error of a file, without its path."""
    (folder / "x.toml").write_text(text)
    with pytest.raises(DeploymentError) as caught:
        read_deployment(folder / "x.toml")
    path, _, message = str(caught.value).partition(": ")
    assert path == str(folder / "x.toml")
    return message


def test_a_good_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f'catalog = ["more"]\n{GOOD}')
    file = read_deployment(tmp_path / "x.toml")
    assert file.catalog == (str(tmp_path / "more"),), "relative to the file, wherever the command runs"
    spec = file.services["digits"]
    assert (spec.router, spec.percentile, spec.expire, spec.on_late) == ("deadline", 0.98, True, "serve")
    assert [(one.capacity, one.batch) for one in file.workers[0].instances] == [(15, (1, 1)), (5, (1, 3))]
    assert (file.gateway.port, file.gateway.processes, file.scheduler.slot_s) == (8731, 1, 1.0)
    assert check_deployment(file.desired_state()) == ""


SHIPPED = sorted((Path(__file__).parents[3] / "deploy").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_deployments_are_good(path: Path) -> None:
    assert read_deployment(path).name == path.stem


@pytest.mark.parametrize(
    ("line", "instead", "named"),
    [
        # wrong types: the key with its place, the value, what is expected
        ("requirement_ms = 250", "requirement_ms = '250'", ("services.digits.requirement_ms = '250'", "float")),
        ("port = 8731", "port = 'x'", ("gateway.port = 'x'", "int")),
        ('["heavy", "light"]', '["heavy", 3]', ("services.digits.variants[1] = 3", "str")),
        ("capacity = 5", "capacity = 'many'", ("workers[0].instances[1].capacity = 'many'", "int")),
        ("batch = [1, 3]", "batch = [1]", ("workers[0].instances[1].batch = [1]", "length 2")),
        # unknown and missing keys: what there is
        ("requirement_ms = 250", "requirement_ms = 250\nfrobs = 3", ("digits.frobs = 3", "no such key", "router")),
        ("port = 8731", "prt = 8731", ("gateway.prt = 8731", "no such key", "port")),
        ('variant = "heavy"', 'varient = "heavy"', ("workers[0].instances[0].varient = 'heavy'", "variant")),
        ('name = "x"', 'nam = "x"', ("nam = 'x'", "no such key", "name")),
        ('name = "a"', "", ("workers[0].name is missing",)),
        ("requirement_ms = 250", "", ("services.digits.requirement_ms is missing",)),
        # values
        ("requirement_ms = 250", "requirement_ms = 0", ("requirement_ms = 0", "above 0")),
        ("requirement_ms = 250", "requirement_ms = nan", ("requirement_ms = nan", "above 0")),
        ("requirement_ms = 250", "requirement_ms = 250\npercentile = 98", ("percentile = 98", "0.98")),
        ("requirement_ms = 250", "requirement_ms = 250\non_late = 'drop'", ("on_late = 'drop'", "'serve' or 'error'")),
        ("requirement_ms = 250", "requirement_ms = 250\nmax_body_bytes = 0", ("max_body_bytes = 0", "from 1")),
        ("requirement_ms = 250", "requirement_ms = 250\ntop_k = 0", ("top_k = 0", "from 1")),
        ('["heavy", "light"]', "[]", ("services.digits.variants = []", "once")),
        ('["heavy", "light"]', '["heavy", "heavy"]', ("services.digits.variants", "once")),
        ("[services.digits]", '[services."no spaces"]', ("services.no spaces", "a-z")),
        ('name = "a"', 'name = "../a"', ("'../a'", "a-z")),
        ('variant = "heavy"', 'variant = "hevy"', ("'hevy'", "belongs to no service", "did you mean 'heavy'?")),
        ("requirement_ms = 250", "requirement_ms = 250\nrouters = 'x'", ("no such key", "did you mean 'router'?")),
        ('name = "a"', 'name = "a"\ndevice = "cuda:b"', ("device = 'cuda:b'", "cuda:1 is the second GPU")),
        ('name = "a"', 'name = "a"\nthreads = 0', ("threads = 0", "from 1")),
        ('name = "a"', 'name = "a"\nthreads = 1_000_000', ("threads = 1000000", "to 1024")),
        (WORKER, "instances = [" + 257 * '{ variant = "heavy" }, ' + "]", ("257 instances", "add workers")),
        ("requirement_ms = 250", "requirement_ms = 250\nphase_rates = [-1]", ("phase_rates = [-1.0]", "none below")),
        ("requirement_ms = 250", "requirement_ms = 250\nphase_rates = [inf]", ("phase_rates = [inf]", "requests/s")),
        ('name = "x"', f'name = "{"x" * 65}"', ("name = 'xxx", "1 to 64 printable")),
        ('name = "a"', 'name = "a"\nmemory_mb = -5', ("memory_mb = -5", "above 0")),
        ("capacity = 5", "capacity = 0", ("capacity = 0", "from 1")),
        ("batch = [1, 3]", "batch = [3, 1]", ("batch = (3, 1)", "min <= max")),
        ("batch = [1, 3]", "batch = [1, 6]", ("batch = (1, 6)", "capacity")),
        ('variant = "light"', 'variant = "other"', ("'other'", "belongs to no service")),
        (f'[[workers]]\nname = "a"\n{WORKER}', "workers = []", ("workers",)),
        ("port = 8731", "port = 70000", ("gateway.port = 70000", "65535")),
        ("port = 8731", "port = 8731\nprocesses = 0", ("gateway.processes = 0", "from 1")),
        ("port = 8731", "port = 8731\nbody_timeout_s = 0", ("gateway.body_timeout_s = 0", "above 0")),
        ("port = 8731", "port = 8731\nuploads_mb = 15", ("gateway.uploads_mb = 15.0", "from 16 (a body)")),
        ("port = 8731", "port = 8731\nuploads_mb = nan", ("gateway.uploads_mb = nan", "from 16")),
        ("[gateway]", "[scheduler]\nslot_s = 0.01\n[gateway]", ("scheduler.slot_s = 0.01", "0.05")),
        ('name = "x"', 'name = "x', ("is not valid TOML", "line 2")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, line: str, instead: str, named: tuple[str, ...]) -> None:
    assert line in GOOD
    message = read(tmp_path, GOOD.replace(line, instead, 1))
    for part in named:
        assert part in message


def test_two_workers_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = GOOD.replace("[gateway]", f'[[workers]]\nname = "a"\n{WORKER}\n[gateway]')
    message = read(tmp_path, twice)
    assert all(part in message for part in ("workers 'a'", "two [[workers]] have this name", "'a-2'")), message


OTHER = """
[services.letters]
variants = ["a", "b"]
requirement_ms = 250
"""


def test_a_service_that_is_on_no_worker_is_refused(tmp_path: Path) -> None:
    message = read(tmp_path, GOOD.replace("[[workers]]", f"{OTHER}[[workers]]", 1))
    assert message.startswith("services.letters.variants = ['a', 'b']: none of them is on a worker")
    assert "{ variant = 'b' }" in message, "the remedy"
    placed = GOOD.replace("[[workers]]", f"{OTHER}[[workers]]", 1).replace('"heavy" }', '"heavy" }, { variant = "a" }')
    (tmp_path / "x.toml").write_text(placed)
    assert read_deployment(tmp_path / "x.toml").services.keys() == {"digits", "letters"}


def test_a_variant_of_two_services_is_refused(tmp_path: Path) -> None:
    """An instance serves one service: the other would never be ready."""
    twice = GOOD.replace("[[workers]]", f"{OTHER.replace('b', 'light')}[[workers]]", 1)
    message = read(tmp_path, twice)
    assert message.startswith("services.letters.variants: 'light' is in services.digits.variants too")


@pytest.mark.parametrize("router", ["single-queue", "single-queue-random"])
def test_a_single_queue_needs_one_gateway(tmp_path: Path, router: str) -> None:
    text = GOOD.replace("requirement_ms = 250", f"requirement_ms = 250\nrouter = '{router}'")
    (tmp_path / "x.toml").write_text(text)
    assert read_deployment(tmp_path / "x.toml").services["digits"].router == router
    assert "gateway.processes = 2" in read(tmp_path, f"{text}processes = 2\n")


def test_a_list_in_an_error_is_short() -> None:
    assert few_of([]) == []
    assert few_of("abc", most=3) == ["a", "b", "c"]
    assert few_of((f"s{number}" for number in range(20_000)), most=2) == ["s0", "s1", "and 19,998 more"]


def test_a_file_that_is_not_there_or_not_text_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"cannot be read.*-f"):
        read_deployment(tmp_path / "nowhere.toml")
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DeploymentError, match="not valid TOML"):
        read_deployment(tmp_path / "x.toml")


def test_a_policy_file_is_relative_to_the_file_and_a_name_stays_one(tmp_path: Path) -> None:
    for given, meant in (("runs/mine", str(tmp_path / "runs" / "mine")), ("learned-po", "learned-po"), ("", "")):
        text = GOOD.replace("requirement_ms = 250", f"requirement_ms = 250\npolicy_file = '{given}'")
        (tmp_path / "x.toml").write_text(text)
        assert read_deployment(tmp_path / "x.toml").services["digits"].policy_file == meant
