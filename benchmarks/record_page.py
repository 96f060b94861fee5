"""The measurements of the speed record, their targets, and the pages with the results (record.py).

`page` is benchmarks/RECORD.md; `speed_block` is the table of the README.
"""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "record", HERE / "RECORD.md"
README = HERE.parent / "README.md"
DEFAULT, PADDED = "smollm2-135m", "padded"
GEMMA = "gemma3-270m"
REAL = {DEFAULT: "The default model, Q4_1", GEMMA: "Gemma 3 270M, Q4_K_M"}  # by short name
BOTH = "--vs llama.cpp --vs llama.cpp-as-stored"
MORE = "--prompt 512 --batch 1,8"
LONG = "--prompt 512 --context 4096 --runs 2 --new 32 --vs llama.cpp"
# No package contains ik_llama.cpp: build its `llama-bench` first (record.py --llama-bench).
PROGRAM = "llama-bench"
IK_COMMAND = (
    f"python benchmarks/llama_bench.py {PROGRAM} MODEL --flags='-rtr 1' "
    "--name 'ik_llama.cpp 8337e4c'"
)
LARGE = "--prompt 512 --batch 1,8 --runs 2 --new 16 --vs llama.cpp"


@dataclass(frozen=True)
class Line:
    """One measurement. `model` is a short name, SHAPE-TYPE of random weights, or padded-TYPE."""

    name: str
    model: str
    command: str  # MODEL stands for the file
    title: str

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json"


def title_of(model: str) -> str:
    shape, _, kind = model.partition("-")
    shape = shape.replace("qwen3_", "Qwen3 ").upper().replace("QWEN", "Qwen")
    return REAL.get(model, f"{shape} shape, {kind}")


def bench(model: str, options: str, *, more: str = "") -> Line:
    title = title_of(model)
    name, title = (f"{model}-{more}", f"{title}, {more}") if more else (model, title)
    return Line(name, model, f"glassllama bench MODEL {options}", title)


LINES = (
    bench(DEFAULT, "--grid --vs llama.cpp"),  # its Q4_1 is not repacked by llama.cpp
    *(bench(f"135m-{kind}", f"{MORE} {BOTH}") for kind in ("Q4_0", "Q8_0")),
    bench("135m-BF16", f"{MORE} --vs llama.cpp"),
    *(bench(f"1b-{kind}", f"{MORE} --new 32 {BOTH}") for kind in ("Q4_0", "Q8_0", "Q4_K_M")),
    bench("1b-BF16", f"{MORE} --new 32 --vs llama.cpp"),
    bench("1b-Q4_0", LONG, more="long"),
    bench(GEMMA, f"{MORE} --vs llama.cpp"),
    *(
        bench(f"qwen3_{size}-{kind}", f"{MORE} --new 32 {BOTH}")
        for size in ("0.6b", "1.7b")
        for kind in ("Q8_0", "Q4_K_M")
    ),
    *(bench(f"8b-{kind}", LARGE) for kind in ("Q4_0", "Q4_K_M")),
    Line("busy-core", DEFAULT, "python benchmarks/busy_core.py MODEL", "With another busy process"),
    *(
        Line(name, model, "python benchmarks/fidelity.py MODEL", title)
        for name, model, title in (
            ("fidelity", DEFAULT, "Fidelity"),
            ("fidelity-Q4_K_M", f"{PADDED}-Q4_K_M", "Fidelity of K-quants"),
        )
    ),
    Line(
        "agreement",
        GEMMA,
        "python benchmarks/agreement.py MODEL",
        f"Agreement with llama.cpp: {REAL[GEMMA]}",
    ),
    *(
        Line(f"ik-{model}", model, IK_COMMAND, title_of(model))
        for model in (
            DEFAULT,
            *(f"135m-{kind}" for kind in ("Q4_0", "Q8_0", "BF16")),
            *(f"1b-{kind}" for kind in ("Q4_0", "Q8_0", "Q4_K_M", "BF16")),
            *(f"8b-{kind}" for kind in ("Q4_0", "Q4_K_M")),
        )
    ),
)


@dataclass(frozen=True)
class Target:
    """Minimum ratio to the fastest peer and minimum share of the bound; `either`: one suffices."""

    ratio: float
    share: float | None = None
    either: bool = False

    def text(self) -> str:
        share = "" if self.share is None else f"{self.share:.0%} of the bound"
        join = " or " if self.either else ", "
        return join.join(part for part in (f"{self.ratio:g}×", share) if part)

    def verdict(self, ratio: float | None, share: float | None) -> str:
        checks = {}
        if ratio is not None:
            checks["ratio"] = ratio >= self.ratio
        if self.share is not None and share is not None:
            checks["bound"] = share >= self.share
        if not checks:
            return "–"
        if self.either or len(set(checks.values())) == 1:
            met = any(checks.values()) if self.either else all(checks.values())
            return "met" if met else "**not met**"
        return ", ".join(f"{k} {'met' if met else '**not met**'}" for k, met in checks.items())


RATIOS_135M = {"Q4_1": 3.0, "Q4_0": 2.5, "Q8_0": 2.0, "BF16": 1.6}
CONTEXT_TARGET, BATCH_TARGET = Target(1.5), Target(2.0)
FIRST_TOKEN_S = 0.6
LONGEST_CONTEXT, MANY_ROWS, LONG_PROMPT = 4096, 8, 512
PERPLEXITY_SLACK = 0.001


def target(line: Line, row: dict[str, Any]) -> Target | None:
    """The target of a row, or None."""
    small = line.model in (DEFAULT, *(f"135m-{kind}" for kind in RATIOS_135M))
    kind = "Q4_1" if line.model == DEFAULT else line.model.partition("-")[2]
    if row["what"] == "prefill":
        if row["tokens"] != LONG_PROMPT:
            return None
        return Target(1.2, 0.65) if kind == "BF16" else Target(2.0, 0.55)
    if row["batch"] == MANY_ROWS:
        return None if line.model.startswith("8b") else BATCH_TARGET
    if row["context"] == LONGEST_CONTEXT:
        return CONTEXT_TARGET
    if row["context"] or row["batch"] > 1 or (kind == "BF16" and not small):
        return None
    if small:
        return Target(RATIOS_135M[kind], 0.75, either=True)
    return Target(1.4, 0.90, either=True)


HEAD = """# Speed record

Written by `python benchmarks/record.py` from the results in `benchmarks/results/record/`;
`python benchmarks/record.py --measure` measures those that are missing.

All speeds are medians in tokens per second. Prompts are random tokens; speculation is off.
llama.cpp loads the same file with the same number of threads in the same process, and the two are
measured alternately. *as stored* is llama.cpp without repacking weights for the processor. A ratio
compares with the faster of the two.

The bound of a decode step is the speed at which these threads read memory, measured in the same run
with a compiled loop. The bound of a prefill is the processor's fastest dot product for this number
format (the first that is named) on data in the first-level cache. Files named after a shape contain
random weights of that shape: SmolLM2 135M, Llama 3.2 1B, Llama 3.1 8B, Qwen3 0.6B and 1.7B.

The target of a decode step is met by its ratio **or** by its share of the bound, because memory
speed varies on a machine that is shared. ik_llama.cpp, the fastest fork known, has its own table.
"""
PADDED_MODEL = (
    "The default model, padded with zeros because K-quants need row lengths that are multiples of "
    "256 (`python benchmarks/padded.py`), quantized by llama.cpp. "
)
MISSING = "\nNot measured yet: {}.\n"


def read_results() -> dict[str, dict[str, Any]]:
    """The results that exist, by the name of their line."""
    return {
        line.name: json.loads(line.result.read_text()) for line in LINES if line.result.exists()
    }


def page() -> str:
    """The text of RECORD.md."""
    results = read_results()
    lines = [line for line in LINES if line.name in results]
    missing = [line.name for line in LINES if line.name not in results]
    parts = [HEAD, MISSING.format(", ".join(missing)) if missing else ""]
    parts += [machine_part(lines, results)] if lines else []
    benches = [line for line in lines if "rows" in results[line.name]["result"]]
    forks = [line for line in benches if line.command == IK_COMMAND]
    benches = [line for line in benches if line.name != "busy-core" and line not in forks]
    parts += [bench_part(line, results[line.name]["result"]) for line in benches]
    if "busy-core" in results:
        parts.append(busy_core_part(results["busy-core"]["result"]))
    if forks:
        parts.append(fork_part({line: results[line.name]["result"] for line in forks}))
    measured = [line for line in lines if line.name.startswith("fidelity")]
    parts += [fidelity_part(line, results[line.name]["result"]) for line in measured]
    measured = [line for line in lines if line.name == "agreement"]
    parts += [agreement_part(line, results[line.name]["result"]) for line in measured]
    return "".join(parts)


IN_README = ("smollm2-135m", "1b-Q4_0", "1b-Q8_0", "1b-Q4_K_M", "1b-BF16", "8b-Q4_0", "8b-Q4_K_M")
LINK = "benchmarks/RECORD.md"
README_NAMES = {"1b": "Llama 3.2 1B", "8b": "Llama 3.1 8B"}
BLOCK = re.compile(r"(<!-- speed: .*? -->\n).*?(<!-- end of speed -->)", re.DOTALL)


def speed_block() -> str:
    """The table of the README: prefill of 512 tokens, and decode of an answer."""
    results = read_results()
    rows, dates, machines, peers = [], set(), set(), set()
    for name in IN_README:
        ours, fork = results[name], results[f"ik-{name}"]
        machine = ours["result"]["machine"]
        dates |= {ours["date"], fork["date"]}
        machines.add(f"{machine['cores']} cores of an {machine['cpu'].replace('(R)', '')}")
        peers |= {ours["result"]["peers"][0]["name"], fork["result"]["peer"]}
        shape, _, weight_type = name.partition("-")
        default = name == DEFAULT
        cells = ["SmolLM2 135M, Q4_1" if default else f"{README_NAMES[shape]}, {weight_type}"]
        for what in ("prefill", "decode"):
            row = single_row(ours["result"], what)
            cells.append(f"{row['tok_s']:,.0f}" if row["tok_s"] > 99 else f"{row['tok_s']:.1f}")
            cells.append(f"{row['tok_s'] / max(row['peers']):.1f}")
            cells.append(f"{single_row(fork['result'], what)['ratio']:.1f}")
        rows.append(cells)
    text = (
        f"Tokens per second on {', '.join(sorted(machines))} with AVX-512 and AMX, two threads, "
        f"and how many times (×) as fast as {' and '.join(sorted(peers, reverse=True))} on the "
        f"same files ({', '.join(sorted(dates))}). llama.cpp uses AVX-512: its AMX build crashed "
        "on this machine. 1B and 8B are random weights of that shape."
    )
    text = f"\n{textwrap.fill(text, 96)}\n[All measurements and their commands]({LINK}).\n\n"
    columns = [""]
    for what in ("reading 512 tokens", "generating"):
        columns += [f"{what}>", "× llama.cpp>", "× ik_llama.cpp>"]
    return text + table(columns, rows) + "\n"


def single_row(result: dict[str, Any], what: str) -> dict[str, Any]:
    """Prefill of 512 tokens, or decode of one sequence after a short prompt."""
    return next(
        row for row in result["rows"]
        if row["what"] == what and not row.get("context") and row.get("batch", 1) == 1
        and (what == "decode" or row["tokens"] == LONG_PROMPT)
    )  # fmt: skip


def readme() -> str:
    """The README with an up-to-date table."""
    text = README.read_text(encoding="utf-8")
    return BLOCK.sub(lambda match: match[1] + speed_block() + match[2], text)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown; a column whose title ends in `>` is aligned to the right."""
    lines = [[title.rstrip(">") for title in columns]]
    lines.append(["--:" if title.endswith(">") else "---" for title in columns])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [*lines, *rows])


def machine_part(lines: list[Line], found: dict[str, dict[str, Any]]) -> str:
    machines: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        result = found[line.name]["result"]
        machines.setdefault(machine_name(result), []).append(result)
    text = "\n## Machines\n"
    for name, results in machines.items():
        flags = sorted({flag for r in results for flag in r["machine"]["flags"]})
        versions = sorted({f"{k} {v}" for r in results for k, v in r["versions"].items()})
        peers = sorted({peer["built_with"] for r in results for peer in r.get("peers", [])})
        speeds = [r["bandwidth"] / 1e9 for r in results if r.get("bandwidth")]
        text += f"\n{name}; with these instruction sets: {', '.join(flags)}.\n"
        if speeds:
            text += f"Memory was read at {min(speeds):.1f} to {max(speeds):.1f} GB/s.\n"
        text += f"Versions: {', '.join(versions)}.\n"
        text += "".join(f"llama.cpp was built with: {features}.\n" for features in peers)
    rows = [
        [line.name, f"`{line.command.replace('MODEL', model_word(line))}`",
         found[line.name]["result"]["machine"]["cpu"].split("(")[0].partition(" ")[0],
         found[line.name]["date"], found[line.name]["code"],
         f"{found[line.name]['result']['machine']['load_average']}"]
        for line in lines
    ]  # fmt: skip
    return (
        text
        + "\n"
        + table(["line", "command", "machine", "date", "code", "load average before>"], rows)
    )


def machine_name(result: dict[str, Any]) -> str:
    return f"{result['machine']['cpu']}, {result['machine']['cores']} cores"


def model_word(line: Line) -> str:
    return line.model if line.model in REAL else f"{line.model}.gguf"


def bench_part(line: Line, r: dict[str, Any]) -> str:
    titles = ["", "tok/s>", "used>", "of the bound>", *(f"{p['name']}>" for p in r["peers"])]
    rows = [bench_cells(line, r, row) for row in r["rows"]]
    peaks = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in r["peaks"].items())
    tail = (
        f"\n{r['bytes_per_token'] / 1e6:,.1f} MB read per token, memory {r['bandwidth'] / 1e9:.1f} "
        f"GB/s: bound {r['bound_tok_s']:,.0f} tok/s. Tier {r['tier']}, {r['threads']} threads, "
        f"medians of {r['runs']}. Peak GOP/s: {peaks}.\n"
    )
    first = f"Load {r['load_s']:.2f} s, first token {r['first_token_s']:.2f} s"
    for peer in r["peers"]:
        first += f"; {peer['name']} {peer['load_s']:.2f} s and {peer['first_token_s']:.2f} s"
    return (
        f"\n## {line.title}\n\n"
        + table([*titles, "ratio>", "target", ""], rows)
        + tail
        + first
        + (first_token_verdict(r) if line.model == DEFAULT else ".\n")
    )


def first_token_verdict(r: dict[str, Any]) -> str:
    ours = r["load_s"] + r["first_token_s"]
    theirs = min(peer["load_s"] + peer["first_token_s"] for peer in r["peers"])
    met = ours <= FIRST_TOKEN_S and ours <= theirs
    return (
        f". Target: at most {FIRST_TOKEN_S} s in total, and at most llama.cpp's {theirs:.2f} s: "
        f"{ours:.2f} s, {'met' if met else '**not met**'}.\n"
    )


def bench_cells(line: Line, r: dict[str, Any], row: dict[str, Any]) -> list[str]:
    what = f"{row['what']} {row['tokens']:,}"
    what += f" after {row['context']:,}" if row["context"] else ""
    what += f", {row['batch']} rows" if row["batch"] > 1 else ""
    if row["bytes_s"] is not None:
        used, share = f"{row['bytes_s'] / 1e9:.1f} GB/s", row["bytes_s"] / r["bandwidth"]
        shown = f"{share:.0%}"
    else:
        used, share = f"{row['ops_s'] / 1e9:,.0f} GOP/s", row["ops_s"] / r["peaks"][r["peak"]]
        alike = [name for name in r["peaks"] if name.split()[0] == r["peak"].split()[0]]
        shown = ", ".join(f"{row['ops_s'] / r['peaks'][name]:.0%} of {name}" for name in alike)
    ratio = row["tok_s"] / max(row["peers"]) if row["peers"] else None
    aim = target(line, row)
    verdict = ["", ""] if aim is None else [aim.text(), aim.verdict(ratio, share)]
    return [
        what, f"{row['tok_s']:,.1f}", used, shown, *(f"{rate:,.1f}" for rate in row["peers"]),
        "" if ratio is None else f"{ratio:.2f}", *verdict,
    ]  # fmt: skip


def fork_part(results: dict[Line, dict[str, Any]]) -> str:
    """One table that compares all files with the fork of llama.cpp."""
    peers = sorted({result["peer"] for result in results.values()})
    modes = list(next(iter(results.values()))["rows"][0]["peers"])
    rows = []
    for line, result in results.items():
        for row in result["rows"]:
            aim, share = fork_target(line, row["what"]), None
            if row["bytes_s"] is not None:
                share = row["bytes_s"] / result["bandwidth"]
            verdict = ["", ""] if aim is None else [aim.text(), aim.verdict(row["ratio"], share)]
            rows.append([
                line.title, f"{row['what']} {row['tokens']}", f"{row['tok_s']:,.1f}",
                "" if share is None else f"{share:.0%}",
                *(f"{row['peers'][mode]:,.1f}" for mode in modes), f"{row['ratio']:.2f}", *verdict,
            ])  # fmt: skip
    titles = [
        "",
        "",
        "tok/s>",
        "of the bound>",
        *(f"`{f'llama-bench {mode}'.strip()}`>" for mode in modes),
    ]
    return (
        f"\n## Comparison with {', '.join(peers)}\n\nThe fastest fork of llama.cpp that is known, "
        "built for this processor. Its own `llama-bench` and glassllama run alternately on the "
        "same files with the same number of threads. A ratio compares with the faster of its two "
        "modes.\n\n" + table([*titles, "ratio>", "target", ""], rows)
    )


def fork_target(line: Line, what: str) -> Target | None:
    """The target of a row against ik_llama.cpp, or None."""
    shape, _, kind = line.model.partition("-")
    small = line.model == DEFAULT or shape == "135m"
    if what == "prefill":
        return Target(1.2 if kind == "BF16" else 1.7 if small else 1.3)
    if small:
        return Target({"Q4_0": 1.5, "Q8_0": 1.6, "BF16": 1.6}.get(kind, 2.0), 0.75, either=True)
    return Target(1.4, 0.90, either=True) if kind in ("Q4_0", "Q4_K_M") else None


def busy_core_part(r: dict[str, Any]) -> str:
    rows = [
        [row["name"], f"{row['alone']:,.1f}", f"{row['with_load']:,.1f}", f"{row['lost']:.0%}"]
        for row in r["rows"]
    ]
    ours, *theirs = (row["lost"] for row in r["rows"])
    met = "met" if ours <= min(theirs) else "**not met**"
    return (
        "\n## With another busy process\n\nDecode of the default model while another process keeps "
        "one of the two cores busy.\n\n"
        + table(["", "alone, tok/s>", "with it, tok/s>", "lost>"], rows)
        + f"\nTarget: lose no larger share than llama.cpp: {met}.\n"
    )


def fidelity_part(line: Line, r: dict[str, Any]) -> str:
    answered, read, perplexity = r["answers_kl"], r["text_kl"], r["perplexity"]
    rows = [
        [f"answer {n}", str(row["ids"]), f"{row['ours']:.5f}", f"{row['llama.cpp']:.5f}", "", ""]
        for n, row in enumerate(r["answers"], 1)
    ]
    rows.append(kl_cells("all answers", len(rows), answered))
    rows.append(kl_cells("the LICENSE file", r["tokens"], read))
    near = "met" if perplexity["more"] <= PERPLEXITY_SLACK else "**not met**"
    return (
        f"\n## {line.title}\n\n"
        + ("" if line.model == DEFAULT else PADDED_MODEL)
        + "Mean KL divergence (nats) from exact float32 arithmetic, at each token of some answers "
        "and of a text. Target: not larger than llama.cpp's. Differences are given with their "
        "standard error, over answers or tokens.\n\n"
        + table(["", "over>", "glassllama>", "llama.cpp>", "difference>", ""], rows)
        + f"\nPerplexity of the LICENSE file, {r['tokens']:,} tokens in windows of 512: exact "
        f"{perplexity['exact']:.4f}, glassllama {perplexity['ours']:.4f}, llama.cpp "
        f"{perplexity['llama.cpp']:.4f}. glassllama relative to llama.cpp: "
        f"{perplexity['more']:+.2%}, standard error {perplexity['error']:.2%}. "
        f"Target: within 0.1% of llama.cpp's, or better: {near}.\n"
    )


def kl_cells(what: str, count: int, kl: dict[str, float]) -> list[str]:
    verdict = "met" if kl["more"] <= 0 else "**not met**"
    if abs(kl["more"]) <= kl["error"]:
        verdict += ", by less than the error"
    difference = f"{kl['more']:+.5f} ± {kl['error']:.5f}"
    return [what, str(count), f"{kl['ours']:.5f}", f"{kl['llama.cpp']:.5f}", difference, verdict]


AGREEMENT = """
## {title}

Exact mode is compared with llama.cpp in float32 (weights, keys and values), and default mode with
llama.cpp on the file as it is. Exact mode continues twelve prompts greedily; all programs read the
same ids, and the most likely id is compared at each. A difference is a near tie if the two logits
are closer than rounding can explain: both gaps together, by which each program prefers its own id,
are at most 4·√2 standard deviations of the difference of a logit in both programs.

"""


def agreement_part(line: Line, r: dict[str, Any]) -> str:
    titles = ("ids>", "different>", "deviation of a logit>", "near tie>", "beyond a near tie>", "")
    rows = [
        [pair, f"{g['ids']}", f"{g['different']}", f"{g['sigma']:.3g}", f"{g['tie']:.3g}",
         f"{g['no_ties']}", "**not met**" if g["no_ties"] else "met"]
        for pair, g in r["greedy"].items()
    ]  # fmt: skip
    text = AGREEMENT.format(title=line.title) + table(["", *titles], rows)
    columns = ["prompt", "id>", "glassllama's, llama.cpp's", "logits of glassllama>",
               "logits of llama.cpp>", "both gaps>"]  # fmt: skip
    for pair, g in r["greedy"].items():
        if g["rows"]:
            text += f"\nThe differences of {pair}:\n\n"
            text += table(columns, [difference_cells(row) for row in g["rows"]])
    return text + perplexity_text(r["perplexity"]) + tokenizer_part(r["tokenizer"])


def difference_cells(row: dict[str, Any]) -> list[str]:
    logits = (", ".join(f"{logit:.3f}" for logit in row[name]) for name in ("ours", "llama.cpp"))
    words, *texts = (
        f"`{json.dumps(text, ensure_ascii=False)}`".replace("|", "\\|")
        for text in (row["prompt"], *row["texts"])
    )
    return [words, f"{row['place'] + 1}", ", ".join(texts), *logits, f"{row['gaps']:.3f}"]


def perplexity_text(r: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.4f}" for name, value in r["values"].items())
    more = "; ".join(
        f"{pair} {mean:+.3%} ± {error:.3%}" for pair, (mean, error) in r["more"].items()
    )
    return (
        f"\nPerplexity of the beginning of {r['text']}, {r['tokens']:,} tokens in windows of "
        f"{r['window']}: {values}. glassllama relative to llama.cpp, with standard error: {more}.\n"
    )


def tokenizer_part(rows: list[dict[str, Any]]) -> str:
    cells = [
        [row["corpus"], "parsed" if row["specials"] else "text", f"{row['texts']:,}",
         f"{row['characters']:,}", f"{row['different']}"]
        for row in rows
    ]  # fmt: skip
    met = "**not met**" if any(row["different"] for row in rows) else "met"
    titles = ["", "special tokens", "texts>", "characters>", "different ids>"]
    head = "\nIds of texts, compared with those of llama.cpp:\n\n"
    return head + table(titles, cells) + f"\nTarget: no differences: {met}.\n"
