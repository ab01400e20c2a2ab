"""Encoding rows against `datasets.map` with the same tokenizer and two processes, and how full bins become.

    .venv/bin/python benchmarks/data.py [--pairs 5] [--rows 40000] [--million] [--alpaca FILE]

All start from the same JSONL file of short chats and end with token ids in an Arrow file, taking turns, each
in a process of its own. lorakit reads the file, checks every row, and finds and stores which tokens carry loss.
`map` renders the chat template and tokenises in batches, nothing else; `map_with_mask` lets transformers find
the assistant's tokens, too (by a template with generation marks). Loading the file into Arrow, which `datasets`
does first, is told apart: `seconds` are those of `map` alone, `with_loading` those from the file on.
``--million`` encodes a million rows and a tenth of them, and compares the memory. The result goes to
``results/data.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lorakit import hardware
from lorakit.data.encode import encode_all
from lorakit.data.packing import best_fit, fill
from lorakit.data.prepare import CacheUse, Encoder, prepare
from lorakit.data.reading import SampleStream, find_sets, read_samples
from lorakit.data.rendering import Policy
from lorakit.data.templates import find_template
from lorakit.files import write_json
from lorakit.modelinfo.demo import DEMO_MODEL
from lorakit.models.load import load_tokenizer
from lorakit.models.sources import locate

CUTOFF, WORKERS = 2048, 2
QUESTION = "what is the sum of a few numbers and how would you explain it to somebody new here please"
MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--alpaca", type=Path, help="alpaca rows, to fill bins with")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a single measurement: who, file
    options = parser.parse_args()
    if options.one:
        who, file = options.one
        print(json.dumps(CONTESTANTS[who](Path(file))))
        return
    target = Path(__file__).parent / "results" / "data.json"
    result: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    result |= {"processor": hardware.processor_name(), "processes": WORKERS, "tokenizer": DEMO_MODEL}
    with tempfile.TemporaryDirectory() as folder:
        if options.pairs:
            result["speed"] = compare(write_rows(Path(folder) / "rows.jsonl", options.rows), options)
        if options.million:
            result["memory"] = [
                measure("lorakit", write_rows(Path(folder) / f"{rows}.jsonl", rows)) for rows in (10**5, 10**6)
            ]
    if options.alpaca:
        result["packing"] = packing(options.alpaca)
    write_json(target, result)
    print(json.dumps(result, indent=2))


def compare(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of all in turns, after one that warms the disk up."""
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in CONTESTANTS}
    for turn in range(options.pairs + 1):
        for who in list(CONTESTANTS)[:: 1 if turn % 2 else -1]:
            found = measure(who, file)
            if turn:
                runs[who].append(found)
    assert len({run["tokens"] for found in runs.values() for run in found}) == 1
    seconds = {who: [run["seconds"] for run in found] for who, found in runs.items()}
    whole = {who: [run["seconds"] + run.get("loading", 0) for run in found] for who, found in runs.items()}
    return {
        "rows": options.rows,
        "tokens": runs["map"][0]["tokens"],
        "rows_per_second": {
            who: round(options.rows / statistics.median(found)) for who, found in seconds.items()
        },
        "cpu_seconds": {
            who: round(statistics.median(r["cpu"] for r in found), 1) for who, found in runs.items()
        },
        "seconds_over_lorakit": {who: ratios(found, seconds["lorakit"]) for who, found in seconds.items()},
        "with_loading": {who: ratios(found, whole["lorakit"]) for who, found in whole.items()},
    }


def ratios(others: list[float], ours: list[float]) -> dict[str, Any]:
    """How much longer the other took, pair by pair."""
    found = [other / our for other, our in zip(others, ours, strict=True)]
    return {"median": round(statistics.median(found), 2), "all": [round(ratio, 2) for ratio in found]}


def measure(who: str, file: Path) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", who, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def ours(file: Path) -> dict[str, float]:
    """The whole way of lorakit, from the file to the cache."""
    tokenizer = load_tokenizer(locate(DEMO_MODEL))
    encoder = Encoder(tokenizer, find_template(tokenizer), Policy(CUTOFF))
    import datasets  # noqa: F401  # a part of the start-up, as it is for the other one

    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        before, start = cpu(), time.perf_counter()
        samples = SampleStream(find_sets([file]))
        found = prepare(encoder, samples, {}, CacheUse(Path(cache), workers=WORKERS))
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(cache).rglob("*.arrow"))
    return {
        "rows": found.data.rows,
        "tokens": found.data.tokens,
        "seconds": seconds,
        "cpu": cpu() - before,
        "megabytes_of_rows": round(size / 1e6, 1),
        "peak_megabytes": round(hardware.memory_peak() / 1e6),
        "peak_megabytes_of_a_worker": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3),
    }


def theirs(file: Path, *, mask: bool = False) -> dict[str, float]:
    """`datasets`: the file as it is into Arrow, then `map` in batches."""
    import datasets

    tokenizer = load_tokenizer(locate(DEMO_MODEL))
    datasets.disable_progress_bars()

    def encode_with_mask(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = tokenizer.apply_chat_template(
            batch["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "trained": found["assistant_masks"]}

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch["messages"]]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        start = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(file), cache_dir=cache, split="train")
        before, loaded = cpu(), time.perf_counter()
        work = encode_with_mask if mask else encode
        mapped = rows.map(work, batched=True, num_proc=WORKERS, remove_columns=rows.column_names)
        seconds, used = time.perf_counter() - loaded, cpu() - before
        tokens = sum(len(chunk.values) for chunk in mapped.data.table.column("input_ids").chunks)
    return {"tokens": tokens, "seconds": seconds, "loading": loaded - start, "cpu": used}


def theirs_with_mask(file: Path) -> dict[str, float]:
    """The same, and the assistant's tokens."""
    return theirs(file, mask=True)


CONTESTANTS = {"lorakit": ours, "map": theirs, "map_with_mask": theirs_with_mask}


def cpu() -> float:
    """Processor seconds of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def write_rows(file: Path, rows: int) -> Path:
    """Short chats, the same every time."""
    chance = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            a, b = chance.randrange(1000), chance.randrange(1000)
            question = f"{' '.join(chance.choices(QUESTION.split(), k=chance.randint(3, 12)))}: {a} + {b}?"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"{a + b}, of course."},
            ]
            stream.write(json.dumps({"messages": messages, "id": number}) + "\n")
    return file


def packing(file: Path) -> dict[str, Any]:
    """How full bins of ``CUTOFF`` tokens become."""
    tokenizer = load_tokenizer(locate(DEMO_MODEL))
    rows, _ = encode_all(tokenizer, read_samples([file]).samples, Policy(CUTOFF), find_template(tokenizer))
    lengths = [len(row.ids) for row in rows]
    start = time.perf_counter()
    bins = best_fit(lengths, CUTOFF)
    chance = random.Random(0)
    million = chance.choices(lengths, k=10**6)
    began = time.perf_counter()
    many = best_fit(million, CUTOFF)
    return {
        "file": file.name,
        "rows": len(rows),
        "tokens": sum(lengths),
        "bins": len(bins),
        "full": round(fill(lengths, bins, CUTOFF), 4),
        "milliseconds": round((began - start) * 1e3, 1),
        "million_rows": {
            "full": round(fill(million, many, CUTOFF), 5),
            "seconds": round(time.perf_counter() - began, 2),
        },
    }


if __name__ == "__main__":
    main()
