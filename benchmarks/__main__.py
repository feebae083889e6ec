"""Measure every loss against its peers, and write RESULTS.md and its pictures."""

import os

# The libraries below read these when they are imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import overheads, peers, report, tpu, vocabulary, workloads
from benchmarks.timing import interleave
from benchmarks.workloads import COMPILE, NAIVE, OURS, PAIRWISE, PASSES, SPARSE, SQUARED, XLA, C


class Suite:
    """Each section is a method that returns Markdown; ``notes`` say what was left out."""

    def __init__(self, names: list[str] | None, quick: bool):
        names = names or ([SQUARED, SPARSE] if quick else [*workloads.LOSSES])
        self.names, self.quick = names, quick
        self.cases = list(itertools.product(names, PASSES))
        self.scale, self.rounds, self.turn = (64, 3, 0.001) if quick else (1, 11, 0.04)
        self.peers, self.notes = peers.load()
        self.jax_peers = [peer for peer in self.peers if peer.name in (OURS, NAIVE)]
        self.rows: list[dict[str, Any]] = []
        self.points: list[dict[str, Any]] = []
        self.classes: list[dict[str, Any]] = []

    def inputs(self, name: str) -> list[np.ndarray]:
        return workloads.make(name, workloads.shape_of(name, self.scale))

    def measure(self, some: list[Any], name: str, mode: str, inputs: Any, rounds: int = 0) -> Any:
        """A row for each peer that has this loss."""
        print(f"{name} {mode} {[*inputs[0].shape]}")
        exact, calls, arrays, rows = workloads.weighted_mean(name, *inputs), {}, {}, {}
        for peer in some:
            try:
                if (function := peer.function(name, mode)) is None:
                    continue
                if type(peer) not in arrays:
                    arrays[type(peer)] = peer.arrays(inputs)
                call = functools.partial(function, *arrays[type(peer)])
                value = float(call() if mode == "forward" else call()[0])
            except Exception as error:
                self.note_failure(peer.name, f"has no `{name}` (`{mode}`)", error)
                continue
            calls[peer.name], error = call, abs(value / exact - 1)
            rows[peer.name] = {"loss": name, "pass": mode, "peer": peer.name, "error": error}
            rows[peer.name]["note"] = peer.notes.get(name, "")
        self.time(calls, rows, rounds or self.rounds)
        touched = sum(a.nbytes for a in inputs) + inputs[0].nbytes * (mode != "forward")
        for row in rows.values():
            row["rate"] = touched / row["ms"] / 1e6
        return rows

    def note_failure(self, peer: str, what: str, error: Exception) -> None:
        """Note that a peer failed, and go on without it. An error of ours is raised."""
        if peer == OURS:
            raise error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        self.notes.append(f"{peer} {what}: {reason}")

    def time(self, calls: dict[str, Any], rows: dict[str, dict[str, Any]], rounds: int) -> None:
        """Add to each row the milliseconds of its call, and the ratio to ours."""
        seconds = interleave(calls, rounds, self.turn)
        for peer, row in rows.items():
            row["ms"] = float(np.median(seconds[peer])) * 1e3
            row["ratio"] = float(np.median(seconds[peer] / seconds[OURS]))
            print(f"  {row['ratio']:6.2f} {row['ms']:8.3g} ms {peer}")

    def speed(self) -> str:
        for name, mode in self.cases:
            rows = self.measure(self.peers, name, mode, inputs := self.inputs(name))
            for peer in self.peers:
                if peer.name in rows and isinstance(peer, peers.JaxPeer):
                    compiled = peer.jitted(name, mode).lower(*inputs).compile()
                    size = compiled.memory_analysis().temp_size_in_bytes
                    rows[peer.name]["temporaries"] = report.size(size)
            self.rows += rows.values()
        return report.speed(self.rows, [peer.name for peer in self.peers])

    def sweep(self) -> str:
        some = [p for p in self.peers if p.name in (OURS, NAIVE, COMPILE, XLA, C, "NumPy")]
        for power, mode in itertools.product(range(10, 17 if self.quick else 31, 2), PASSES):
            columns = min(elements := 2**power // 12, 4096)  # Three arrays, four bytes a number.
            inputs = workloads.make(SQUARED, (elements // columns, columns))
            rows = self.measure(some, SQUARED, mode, inputs, 5)
            self.points += [row | {"bytes": 2**power} for row in rows.values()]
        return report.sweep(self.points, [peer.name for peer in some])

    def vocabulary(self) -> str:
        some, left_out = vocabulary.load()
        self.notes += left_out
        tokens, features, powers = (64, 16, (7, 8)) if self.quick else (2048, 512, range(13, 19))
        for power, mode in itertools.product(powers, PASSES):
            inputs, calls, rows = vocabulary.make(tokens, features, 2**power), {}, {}
            where = f"{2**power} classes (`{mode}`)"
            print(where)
            for name, peer in some.items():
                try:
                    call, size = peer(mode, inputs)
                except Exception as error:
                    self.note_failure(name, f"fails at {where}", error)
                    continue
                if size > vocabulary.LIMIT:
                    size, limit = report.size(size), report.size(vocabulary.LIMIT)
                    self.notes.append(f"{name} is left out at {where}: {size} is over {limit}")
                    continue
                point = {"classes": 2**power, "pass": mode, "peer": name}
                calls[name], rows[name] = call, point | {"temporaries": size}
            self.time(calls, rows, 3)
            self.classes += rows.values()
        return report.vocabulary(self.classes, [*some], f"[{tokens}, {features}]")

    def small(self) -> str:
        rows = []
        for name, mode in self.cases:
            found = self.measure(self.jax_peers, name, mode, workloads.make(name, (32, 10)))
            micros = [f"{found[peer]['ms'] * 1e3:.0f}" for peer in (OURS, NAIVE)]
            rows.append((f"`{name}`", f"`{mode}`", *micros, f"{found[NAIVE]['ratio']:.2f}"))
        header = ("loss", "pass", f"{OURS}, µs", f"{NAIVE}, µs", "ratio")
        return report.section("Small calls: jitted, on [32, 10]", header, rows)

    def tracing(self) -> str:
        rows, names = [], self.names * 2
        for mode in PASSES:
            print(f"tracing {len(names)} losses ({mode})")
            found = overheads.trace(self.jax_peers, names, mode, self.rounds)
            for part, seconds in found.items():
                cells, ratio = self.over_naive(seconds, 1e3)
                goal = f"≤ {overheads.GOAL} {'✓' if ratio <= overheads.GOAL else '✗'}"
                rows.append((f"`{mode}`", part, *cells, goal))
        header = ("pass", "part", f"{OURS}, ms", f"{NAIVE}, ms", f"{OURS} / {NAIVE}", "goal")
        text = (
            f"A model of {len(names)} weighted losses, each of another shape, is traced and "
            "lowered again in every round: JAX's caches are cleared, and function and shapes are "
            "new. Nothing is compiled. Above 1 jaxlosses is slower.\n\n"
        )
        return report.section("Tracing and lowering", header, rows, text)

    def dispatch(self) -> str:
        rows = []
        for num_arrays in (10, 100, 300):
            print(f"dispatch {num_arrays} arrays")
            seconds = overheads.dispatch(self.jax_peers, num_arrays, self.rounds, self.turn)
            rows.append((num_arrays, *self.over_naive(seconds, 1e6)[0]))
        header = ("arrays", f"{OURS}, µs", f"{NAIVE}, µs", f"{OURS} / {NAIVE}")
        text = (
            f"One call of a jitted training step: value and gradient of `{SPARSE}` on [32, 10], "
            "and further arrays, float32 of [4], that go in and come out. Above 1 jaxlosses is "
            "slower.\n\n"
        )
        return report.section("Dispatch: a step with many arrays", header, rows, text)

    def over_naive(self, seconds: dict[str, Any], unit: float) -> tuple[list[str], float]:
        """The medians of both, in parts of a second, and the median of the ratios."""
        ours, naive = seconds[OURS], seconds[NAIVE]
        ratio = float(np.median(ours / naive))
        cells = [f"{np.median(s) * unit:.0f}" for s in (ours, naive)] + [f"{ratio:.2f}"]
        print(f"  {cells[2]:>6} {' '.join(cells[:2])}")
        return cells, ratio

    def accuracy(self) -> str:
        side = 300 if self.quick else 10_000
        many, offset = workloads.make(SQUARED, (side, side)), self.inputs(PAIRWISE)
        offset[0] += np.float32(1000)
        cases = ((SQUARED, many), (PAIRWISE, offset))
        found = [self.measure(self.peers, name, "forward", inputs, 1) for name, inputs in cases]
        errors = [{peer: f"{row['error']:.1e}" for peer, row in rows.items()} for rows in found]
        rows = [[p.name, *(error.get(p.name, "") for error in errors)] for p in self.peers]
        rows[0][2] += f" (goal: ≤ 1e-06 {'✓' if found[1][OURS]['error'] <= 1e-6 else '✗'})"
        titles = (f"`{SQUARED}`, {side**2:.0e} elements", f"`{PAIRWISE}`, predictions off by 1000")
        return report.section("Accuracy: relative error, against float64", ("peer", *titles), rows)

    def tpu(self) -> str:
        rows = []
        for title in ["v5e:4x4"] if self.quick else ["v5e:4x4", "v5e:16x16"]:
            try:
                sharding = tpu.sharding(title)
            except Exception as error:  # A missing or busy libtpu raises several kinds.
                reason = (str(error).splitlines() or ["no libtpu"])[0]
                self.notes.append(f"TPU {title} is left out: {reason}")
                continue
            for (name, mode), peer in itertools.product(self.cases, self.jax_peers):
                *cells, held = tpu.measure(peer, name, mode, sharding)
                rows.append((title, f"`{name}`", f"`{mode}`", peer.name, *cells, report.size(held)))
        title = f"TPU: what its compiler predicts for each chip, with {tpu.ROWS} rows"
        return report.section(title, ("slice", "loss", "pass", "peer", *tpu.HEADER), rows)

    def gpu(self) -> str:
        try:
            device = jax.devices("gpu")[0]
        except RuntimeError:
            self.notes.append("GPU is left out: there is none")
            return ""
        rows, copy = [], jax.jit(jnp.copy)
        with jax.default_device(device):
            array = jnp.ones(workloads.shape_of(SQUARED))
            calls = {"copy": lambda: jax.block_until_ready(copy(array))}
            seconds = np.median(interleave(calls, self.rounds, self.turn)["copy"])
            for name, mode in self.cases:
                found = self.measure(self.jax_peers, name, mode, self.inputs(name))
                rates = [found[peer]["rate"] for peer in (OURS, NAIVE)]
                rates += [rates[0] * seconds / (2 * array.nbytes) * 1e11]
                rows.append((f"`{name}`", f"`{mode}`", *(f"{rate:.0f}" for rate in rates)))
        header = ("loss", "pass", OURS, NAIVE, f"{OURS}, % of a device copy")
        return report.section(f"GPU: GB/s on {device.device_kind}", header, rows)


def main() -> None:
    sections = ("speed", "sweep", "vocabulary", "small", "tracing", "dispatch")
    sections += ("accuracy", "tpu", "gpu")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out-dir", type=Path, default=Path("benchmarks"))
    parser.add_argument("--only", nargs="+", choices=workloads.LOSSES, metavar="LOSS")
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and two losses, for a quick look"
    )
    options = parser.parse_args()
    suite, machine = Suite(options.only, options.quick), report.machine()
    with jax.default_device(jax.devices("cpu")[0]):
        parts = [getattr(suite, section)() for section in options.sections]
    options.out_dir.mkdir(parents=True, exist_ok=True)
    picture = ""
    try:
        picture = report.picture(options.out_dir / "results.png", suite.rows, suite.points)
        report.vocabulary_picture(options.out_dir / "vocabulary.png", suite.classes)
    except ImportError as error:
        suite.notes.append(f"The pictures are left out: {error}")
    elements, logits = (
        "{} by {}".format(*workloads.shape_of(n, suite.scale)) for n in (SQUARED, SPARSE)
    )
    notes = "".join(f"- {note}\n" for note in suite.notes)
    text = report.INTRODUCTION.format(
        elements=elements, logits=logits, picture=picture, notes=notes, machine=machine
    )
    (options.out_dir / "RESULTS.md").write_text(text + "".join(parts), encoding="utf-8")
    print(f"{notes}Wrote {options.out_dir / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
