"""The Markdown and the pictures."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.workloads import COMPILE, EAGER, GRAPH, KERAS, NAIVE, OURS, PASSES, XLA, C, goals

PACKAGES = "jax jaxlib libtpu optax tokamax keras tensorflow tensorflow-cpu torch numpy"
# Each peer's mark and colour in the picture.
MARKS = {EAGER: "s:olive", COMPILE: "D:red", GRAPH: "v:brown", XLA: "^:orange"}
MARKS |= {KERAS: "o:purple", C: "|:black"}
BARS = ("#1f77b4", "#9ecae9")

INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks`. A peer that is not installed is left out; for all of them:
`pip install '.[benchmarks,tpu-aot]'` and a C compiler.

All peers get the same inputs and the same weights, a tenth of them zero. All divide by the same
number, the count of the weights that are not zero. Each value is compared with one computed in
float64. Where a peer computes something else, its row says what. Everything is float32, with XLA's
default flags. Element-wise losses have inputs of {elements}, and weights of that shape.
`mean_pairwise_squared_error` and `cosine_distance` have inputs of {elements}, the two softmax
losses {logits} logits, and all four have one weight for each row. `value_and_grad` is with respect
to the first input. All peers run in one process and take turns, in rounds. A time is the median
over the rounds; a ratio is the median of the ratios of each round. Ratios are similar on other
machines, milliseconds are not. OpenMP's threads sleep while they wait, so that they do not keep a
core from another library.

{picture}{notes}
{machine}"""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def section(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], text: str = ""
) -> str:
    """Nothing where there are no rows."""
    return f"\n## {title}\n\n{text}{table(header, rows)}" if rows else ""


def size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GB"


def machine() -> str:
    """The machine and the versions that were measured."""
    rows = {"date": date.today(), "CPU": platform.processor() or platform.machine()}
    with contextlib.suppress(OSError, LookupError, AttributeError):
        rows["load before"] = f"{os.getloadavg()[0]:.1f}"
        rows["CPU"] = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[0]
        cc = subprocess.run(["cc", "--version"], capture_output=True, text=True)
        rows["C compiler"] = cc.stdout.splitlines()[0]
    rows |= {"cores": os.cpu_count(), "system": platform.system()}
    rows["Python"] = platform.python_version()
    for package in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            rows[package] = importlib.metadata.version(package)
    return section("Measured on", ("", ""), [*rows.items()])


def speed(rows: list[dict[str, Any]], peers: Sequence[str]) -> str:
    """A table of the ratios, and a table of every row with all its numbers."""
    summary, full = [], []
    for name, mode in dict.fromkeys((r["loss"], r["pass"]) for r in rows):
        some = {r["peer"]: r for r in rows if (r["loss"], r["pass"]) == (name, mode)}
        goal = goals(name, mode, {peer: r["ratio"] for peer, r in some.items()})
        ratios = [f"{some[peer]['ratio']:.2f}" if peer in some else "" for peer in peers[1:]]
        goal_cell = "; ".join(f"{peer} {text}" for peer, text in goal.items())
        summary.append([f"`{name}`", f"`{mode}`", *ratios, goal_cell])
        for peer, r in some.items():
            cells = [f"`{name}`", f"`{mode}`", peer + f" ({r['note']})" * bool(r["note"])]
            cells += [f"{r['ms']:.3g}", f"{r['ratio']:.2f}", goal.get(peer, "")]
            full.append([*cells, r.get("temporaries", ""), f"{r['error']:.0e}"])
    header = ("loss", "pass", "peer", "ms", "ratio", "goal", "temporaries", "error")
    text = (
        "Above 1 jaxlosses is faster, below 1 it is slower. A goal of 1 is met from 0.95 on; "
        "a goal of 0.77 means at most 1.3 times as long as a plain C loop.\n\n"
    )
    title = "Speed: how many times longer than jaxlosses"
    every = f"\n<details><summary>Every row</summary>\n\n{table(header, full)}\n</details>\n"
    return section(title, ("loss", "pass", *peers[1:], "goal"), summary, text) + every


def sweep(points: list[dict[str, Any]], peers: Sequence[str]) -> str:
    rates = {(p["bytes"], p["pass"], p["peer"]): f"{p['rate']:.3g}" for p in points}
    rows = [
        [size(total), f"`{mode}`", *(rates.get((total, mode, peer), "") for peer in peers)]
        for total, mode in dict.fromkeys(key[:2] for key in rates)
    ]
    text = "Bytes of predictions, labels, weights and gradient, divided by the time.\n\n"
    return section("Size: GB/s of `mean_squared_error`", ("inputs", "pass", *peers), rows, text)


def vocabulary(points: list[dict[str, Any]], peers: Sequence[str], hidden: str) -> str:
    found = {(p["classes"], p["pass"], p["peer"]): p for p in points}
    rows = []
    for classes, mode in dict.fromkeys(key[:2] for key in found):
        cells = []
        for peer in peers:
            row = found.get((classes, mode, peer))
            time = row and (f"{row['ms']:.3g} ms" if peer == OURS else f"{row['ratio']:.2f}")
            cells.append(f"{time}, {size(row['temporaries'])}" if row else "")
        rows.append([classes, f"`{mode}`", *cells])
    text = (
        f"`linear_softmax_cross_entropy` of hidden {hidden}, with more and more classes, beside "
        "peers that compute all logits first; tokamax does so too where there is no TPU. A cell "
        "says how many times longer than ours a peer takes (below 1 ours is slower; our own cell "
        "has the time), and the size of its temporaries. torch does not report its temporaries: "
        "they are estimated from its copies of the logits.\n\n"
        "![Time and temporaries](vocabulary.png)\n\n"
    )
    return section("Vocabulary: the last layer", ("classes", "pass", *peers), rows, text)


def vocabulary_picture(path: Path, points: list[dict[str, Any]]) -> None:
    """Draw how time and temporaries of ``value_and_grad`` grow with the vocabulary."""
    if not points:
        return
    figure, panels = _panels(2, figsize=(12, 5))
    points = [p for p in points if p["pass"] == PASSES[1]]
    titles = {"ratio": "Time over that of jaxlosses", "temporaries": "Temporaries, MB"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for i, peer in enumerate(dict.fromkeys(p["peer"] for p in points)):
            line = [p for p in points if p["peer"] == peer]
            values = [p[key] / (2**20 if key == "temporaries" else 1) for p in line]
            width = 3 if peer == OURS else 1.5
            panel.plot([p["classes"] for p in line], values, "o-", lw=width, c=f"C{i}", label=peer)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks := sorted({p["classes"] for p in points}), map(str, ticks))
        panel.set_xlabel("classes")
        panel.set_title(f"{title} (value_and_grad)", loc="left")
        _tidy(panel)
    panels[0].set_ylim(bottom=0)
    panels[1].set_yscale("log")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def picture(path: Path, rows: list[dict[str, Any]], points: list[dict[str, Any]]) -> str:
    """Draw the speeds of all losses, and how the cost grows with the size, as far as measured.

    Returns the Markdown that shows the picture; nothing where there is nothing to draw.
    """
    drawings = ((_draw_speed, rows, 5), (_draw_sweep, points, 4))
    drawings = [(draw, shown, width) for draw, shown, width in drawings if shown]
    if not drawings:
        return ""
    widths = [width for _, _, width in drawings]
    figure, panels = _panels(len(widths), figsize=(14 / 9 * sum(widths), 7), width_ratios=widths)
    for panel, (draw, shown, _) in zip(panels, drawings, strict=True):
        draw(panel, shown)
        _tidy(panel)
        panel.set_axisbelow(True)
        panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3)
    figure.savefig(path, dpi=110)
    return f"![Speed and size]({path.name})\n\n"


def _panels(number: int, **options: Any) -> Any:
    """A figure and its panels, side by side. Raises an error where matplotlib is not installed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, number, layout="constrained", squeeze=False, **options)
    return figure, panels[0]


def _tidy(panel: Any) -> None:
    panel.minorticks_off()
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)


def _draw_speed(panel: Any, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(r["loss"] for r in rows))
    naive = {(r["loss"], r["pass"]): r["ratio"] for r in rows if r["peer"] == NAIVE}
    for r in rows:
        name, second, first = r["loss"], r["pass"] == PASSES[1], r["loss"] == names[0]
        speed, height = naive[name, r["pass"]] / r["ratio"], names.index(name) + 0.4 * second - 0.2
        if r["peer"] == OURS:
            label = f"{OURS}, {r['pass']}" if first else None
            panel.barh(height, speed - 1, 0.36, left=1, color=BARS[second], label=label)
        elif r["peer"] in MARKS:
            mark, colour = MARKS[r["peer"]].split(":")
            label = None if r["peer"] in panel.get_legend_handles_labels()[1] else r["peer"]
            style = {"ms": 14, "mew": 2.5} if mark == "|" else {"ms": 6.5, "mec": "white"}
            panel.plot(speed, height, mark, color=colour, label=label, **style)
    panel.axvline(1, color="black", linewidth=1)
    panel.set(xscale="log", xlabel="speed over that of optax-naive; right is faster")
    panel.set_xticks(ticks := (0.1, 0.2, 0.5, 1, 2, 5, 10), map(str, ticks))
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_title("Speed of every loss, optax-naive = 1", loc="left")


def _draw_sweep(panel: Any, points: list[dict[str, Any]]) -> None:
    colours = {OURS: BARS[0], NAIVE: "gray"} | {p: m.split(":")[1] for p, m in MARKS.items()}
    for peer, mode in dict.fromkeys((p["peer"], p["pass"]) for p in points):
        line = [(p["bytes"], p["rate"]) for p in points if (p["peer"], p["pass"]) == (peer, mode)]
        style = ":" if mode == PASSES[1] else "--" if peer == C else "-"
        label = None if mode == PASSES[1] else peer + ", near the speed of memory" * (peer == C)
        look = {"color": colours.get(peer, "black"), "lw": 3 if peer == OURS else 1.5}
        panel.plot(*zip(*line, strict=True), style, label=label, **look)
    panel.set(xscale="log", yscale="log", xlabel="predictions, labels and weights", ylabel="GB/s")
    panel.set_xticks(ticks := [2**power for power in range(10, 31, 4)], map(size, ticks))
    panel.set_yticks(ticks := [0.01, 0.1, 1, 10, 100], map(str, ticks))
    panel.set_title("Size: mean_squared_error (dotted: value_and_grad)", loc="left")
