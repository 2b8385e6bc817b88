"""Appending problems: nothing there changes, whoever builds the new ones and however often that is interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from logitcache import open_cache
from logitcache.append import append_problems
from logitcache.build import Build, cut_into_units
from logitcache.codecs import parse_targets
from logitcache.errors import IdentityError, UserError
from logitcache.flops import ModelShape
from logitcache.jobs import BuildRequest, build_cache, describe, score_cache
from logitcache.problems import load_problems
from logitcache.prompts import PromptStyle
from logitcache.scorers.compare import compare_with_reference
from logitcache.scorers.hf import load_engine
from logitcache.scoring import Prompt, Sampling
from logitcache.store import AppendedSet, create, merge, open_store, verify
from logitcache.store.local import LocalPlace
from logitcache.store.place import ByteRange, open_place

PROBLEMS = [{"id": f"p{n}", "problem": f"What is {n} plus {n * n}?", "answer": str(n + n * n)} for n in range(5)]
MORE = [{"id": f"q{n}", "problem": f"What is {n} times {n + 3}?", "answer": str(n * (n + 3))} for n in range(3)]
SAMPLING = Sampling(max_new_tokens=4, seed=5)


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Runs builds of the tiny teacher that differ in little."""

    teacher: Path
    folder: Path

    def problems(self, name: str, problems: list[dict[str, str]]) -> str:
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
        return str(file)

    def request(self, out: str | Path, problems: str, *, append: bool = True) -> BuildRequest:
        return BuildRequest(
            problems=problems,
            out=str(out),
            teacher=str(self.teacher),
            targets="topk:k=8",
            dtype="float32",
            problems_per_unit=2,
            append=append,
        )

    def __call__(self, out: str | Path, problems: str, *, append: bool = True, **more: Any) -> dict[str, Any]:
        request = self.request(out, problems, append=append)
        return build_cache(request, **{"sampling": SAMPLING, "style": PromptStyle(), **more})

    def process(self, out: Path, problems: str) -> subprocess.Popen[str]:
        options = ["--targets", "topk:k=8", "--dtype", "float32", "--problems-per-unit", "2"]
        options += ["--max-new-tokens", "4", "--seed", "5", "--append", "--teacher", str(self.teacher)]
        run = [sys.executable, "-m", "logitcache.cli", "build", "--problems", problems, "--out", str(out)]
        return subprocess.Popen([*run, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@pytest.fixture(scope="module")
def build(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(teacher=tiny_dir, folder=tmp_path_factory.mktemp("problems"))


@pytest.fixture(scope="module")
def first(build: Builder) -> str:
    return build.problems("first", PROBLEMS)


@pytest.fixture(scope="module")
def more(build: Builder) -> str:
    """A set that holds all of the first, and three problems more."""
    return build.problems("more", [*PROBLEMS, *MORE])


@pytest.fixture(scope="module")
def whole(build: Builder, first: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "cache"
    assert build(out, first, append=False)["sealed"]
    return out


@pytest.fixture(scope="module")
def appended(build: Builder, whole: Path, more: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(whole, tmp_path_factory.mktemp("appended") / "cache")
    told = build(copy, more)
    assert [item["count"] for item in told["appended"]] == [3]
    return copy


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The first problems' cache, to spoil."""
    return shutil.copytree(whole, tmp_path / "cache")


@pytest.fixture
def copy_appended(appended: Path, tmp_path: Path) -> Path:
    return shutil.copytree(appended, tmp_path / "appended")


def content(cache: str | Path) -> dict[str, bytes]:
    place = open_place(str(cache))
    return {name: place.read(name) for name, _ in place.sizes("")}


def ids(cache: str | Path) -> list[str]:
    reader = open_cache(str(cache), targets=None)
    return [sequence.problem_id for sequence in reader.read_tokens(range(len(reader)))]


def test_appended_problems_follow_the_first_and_change_no_part(whole: Path, appended: Path) -> None:
    assert ids(appended) == [problem["id"] for problem in [*PROBLEMS, *MORE]]
    before, after = content(whole), content(appended)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert verify(str(appended), deep=True).sound


def test_an_append_that_was_killed_ends_in_the_same_bytes(
    build: Builder, appended: Path, first: str, more: str, copy: Path
) -> None:
    process = build.process(copy, more)
    while process.poll() is None and len(list(copy.rglob("record.json"))) == 6:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert "5 of 8 problems are there already, 3 are new" in said
    build(copy, first, append=False)  # the first set is whole, and stays
    for worker in (1, 0):
        build(copy, more, worker=worker, workers=2)
    assert content(copy) == content(appended)
    build(copy, more)  # nothing new
    assert content(copy) == content(appended)


@pytest.mark.parametrize("where", ["s3", "memory"])
def test_an_append_elsewhere_has_the_same_bytes(
    build: Builder, appended: Path, first: str, more: str, where: str, elsewhere: str
) -> None:
    url = f"{where}://{elsewhere}"
    build(url, first, append=False)
    assert build(url, more)["sealed"]
    assert content(url) == content(appended)


@pytest.fixture
def elsewhere(where: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A path in a store that is there for one test."""
    if where == "memory":
        yield "appended/cache"
        fsspec.filesystem("memory").rm("appended", recursive=True)
        return
    from tools.bench.loopback import s3

    with s3() as (_, options):
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        yield "caches/appended"


@pytest.fixture
def listed_and_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of local places from now on: folders that are listed, objects that are read."""
    asked: list[str] = []
    sizes, read_ranges = LocalPlace.sizes, LocalPlace.read_ranges

    def listed(place: LocalPlace, under: str) -> Iterator[tuple[str, int]]:
        asked.append(under)
        return sizes(place, under)

    def read(place: LocalPlace, ranges: Sequence[ByteRange]) -> list[bytes]:
        asked.extend(item.name for item in ranges)
        return read_ranges(place, ranges)

    monkeypatch.setattr(LocalPlace, "sizes", listed)
    monkeypatch.setattr(LocalPlace, "read_ranges", read)
    return asked


def test_a_third_set_reads_the_ids_of_each_earlier_unit_once(
    build: Builder, copy_appended: Path, listed_and_read: list[str]
) -> None:
    problems = load_problems(build.problems("third", [*PROBLEMS, *MORE, {**MORE[0], "id": "r0"}]))
    new, first = append_problems(open_store(str(copy_appended)), problems, ["topk"])
    assert ([problem.id for problem in new], first) == (["r0"], 5)
    tables = [name for name in listed_and_read if name.endswith("samples.parquet")]
    assert tables == [f"sequences/{unit:08d}/samples.parquet" for unit in range(5)]


def test_info_lists_an_unsealed_cache_once(copy_appended: Path, listed_and_read: list[str]) -> None:
    sealed = describe(str(copy_appended))
    (copy_appended / "manifest.json").unlink()
    listed_and_read.clear()
    told = describe(str(copy_appended))
    assert not told["sealed"]
    assert (told["sequences"], told["targets"]) == (sealed["sequences"], sealed["targets"])
    assert [name for name in listed_and_read if "/" not in name] == ["sequences", "targets"]


def test_an_append_is_refused_where_it_does_not_fit(build: Builder, whole: Path, more: str, copy: Path) -> None:
    with pytest.raises(IdentityError, match=r"count: 5 there, 8 asked, problems.sha256: .* asked; add --append"):
        build(copy, more, append=False)
    with pytest.raises(IdentityError, match=r"another sampling.seed: 5 there, 6 asked"):
        build(copy, more, sampling=replace(SAMPLING, seed=6))
    with pytest.raises(UserError, match=r"append with targets hidden .*it has topk"):
        build_cache(replace(build.request(copy, more), targets="hidden"), sampling=SAMPLING, style=PromptStyle())
    assert content(copy) == content(whole)
    (copy / "sequences" / "00000002" / "record.json").unlink()
    with pytest.raises(UserError, match="1 of 3 units of earlier problems are missing"):
        build(copy, more)


def test_of_appends_at_one_moment_one_is_first(tmp_path: Path) -> None:
    store = create(str(tmp_path / "cache"), {"name": "x"})
    sets = [AppendedSet(count=n, sha256=str(n), first_unit=1, units=1) for n in range(1, 17)]

    def append(wanted: AppendedSet) -> Exception | None:
        try:
            store.append(wanted)
        except IdentityError as error:
            return error
        return None

    with ThreadPoolExecutor(len(sets)) as pool:
        errors = list(pool.map(append, sets))
    (winner,) = [wanted for wanted, error in zip(sets, errors, strict=True) if error is None]
    assert store.appended() == (winner,)
    assert all("another set was appended meanwhile" in str(error) for error in errors if error is not None)


def test_two_commands_that_append_other_problems_lose_nothing(build: Builder, copy: Path) -> None:
    files = [build.problems(f"one-{problem['id']}", [problem]) for problem in MORE[:2]]
    running = [build.process(copy, file) for file in files]
    ended = [(process.communicate(timeout=100)[1], process.returncode) for process in running]
    assert 0 in [code for _, code in ended]
    for said, code in ended:
        assert code == 0 or ("error: append" in said and "Traceback" not in said)
    for file in files:
        build(copy, file)
    assert sorted(ids(copy)[5:]) == ["q0", "q1"]
    assert verify(str(copy), deep=True).sound


def test_an_unfinished_append_is_not_scored_and_names_what_is_missing(
    build: Builder, more: str, copy_appended: Path
) -> None:
    (copy_appended / "targets" / "topk" / "00000004" / "record.json").unlink()
    (copy_appended / "manifest.json").unlink()
    before = content(copy_appended)
    with pytest.raises(UserError, match="1 of 5 units are not built yet; run the build again"):
        score_cache(str(copy_appended), teacher=str(build.teacher), targets="hidden")
    assert content(copy_appended) == before
    build(copy_appended, more)
    told = score_cache(str(copy_appended), teacher=str(build.teacher), targets="hidden")
    assert (told["sealed"], told["targets"]["hidden"]["units"]) == (True, 5)


@pytest.mark.parametrize("damage", [bytes.upper, None], ids=["flipped", "lost"])
def test_a_damaged_set_is_restored(
    appended: Path, copy_appended: Path, damage: Callable[[bytes], bytes] | None
) -> None:
    victim = copy_appended / "appended" / "00000001.json"
    if damage is None:
        victim.unlink()
    else:
        victim.write_bytes(damage(victim.read_bytes()))
    assert not verify(str(copy_appended), repair=True).sound
    assert content(copy_appended) == content(appended)


def test_a_set_lost_before_sealing_is_made_again_by_its_own_command_only(
    build: Builder, appended: Path, more: str, copy_appended: Path
) -> None:
    (copy_appended / "appended" / "00000001.json").unlink()
    (copy_appended / "manifest.json").unlink()
    with pytest.raises(UserError, match="run the command that appended those first"):
        build(copy_appended, build.problems("other", MORE[:2]))
    build(copy_appended, more)
    assert content(copy_appended) == content(appended)


def test_merging_brings_appended_sets_along(appended: Path, whole: Path, tmp_path: Path) -> None:
    merge([str(whole), str(appended)], str(tmp_path / "merged")).seal()
    assert content(tmp_path / "merged") == content(appended)


def test_an_engine_is_compared_with_the_reference_once_in_a_cache(tiny_dir: Path, tmp_path: Path) -> None:
    """The first unit of an appended set adds nothing, as if all had been built at once."""
    engine = load_engine(tiny_dir, dtype="bfloat16")
    prompts = [Prompt(problem_id=str(n), token_ids=(n + 5, 7, 9)) for n in range(3)]
    store = create(str(tmp_path / "cache"), {"name": "x"})
    for first in range(2):
        Build(
            engine=engine,
            shape=ModelShape.from_config(json.loads((tiny_dir / "config.json").read_text())),
            store=store,
            units=(units := cut_into_units(prompts[2 * first : 2 * first + 2], 2, first=first)),
            specs=parse_targets("topk:k=8"),
            sampling=SAMPLING,
            compare=partial(compare_with_reference, tiny_dir),
        ).run(units)
    found = store.seal(units=2).tiers["topk"]
    rows = sum(sequence.completion_tokens for sequence in store.read_sequences("00000000"))
    assert found.engine_kl_nats is not None
    for direction in ("forward", "reverse"):
        measured = found.engine_kl_nats[direction]
        assert measured is not None
        assert measured["samples"] == rows < found.rows
        assert 0 < measured["mean"] < 0.1
