"""The examples run as programs and show what they claim; their README holds what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def numbers(output: str, row: str) -> list[float]:
    """The numbers that follow the words ``row`` in their line."""
    line = next(line for line in output.splitlines() if line.startswith(row))
    return [
        float(word.replace(",", "")) for word in re.findall(r"-?\d[\d,]*\.?\d*(?:e[+-]\d+)?", line[len(row) :])
    ]


@pytest.fixture(scope="module")
def toy() -> str:
    return run("toy_experiment.py")


def test_the_toy_learns_a_change_of_its_rank(toy: str) -> None:
    samples, before, _, fresh = numbers(toy, "W + a matrix of rank 4")
    assert samples == 500
    assert before > 1
    assert fresh < 1e-6 * before


def test_the_toy_shows_why_a_constant_cannot_be_learned(toy: str) -> None:
    samples, before, trained, fresh = numbers(toy, "W x + 5, few samples")
    assert samples == 10
    assert before == 25
    assert trained < 1e-6  # the ten samples are memorised
    assert fresh > 25  # and nothing else is learned
    _, _, trained, fresh = numbers(toy, "W x + 5, many samples")
    assert min(trained, fresh) > 10
    _, _, _, fresh = numbers(toy, "W x + 5, one input always 1")
    assert fresh < 1e-6


def test_the_toy_counts_and_leaves_the_base_alone(toy: str) -> None:
    assert numbers(toy, "frozen") == [10_000, 10_800, 800]
    assert numbers(toy, "sum of |B A|:")[0] > 100
    before, after = numbers(toy, "sum of W:")
    assert before == after != 0


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("example")
    return run("any_pytorch_model.py", folder), folder


def test_the_network_learns_another_task_and_keeps_its_own(network: tuple[str, Path]) -> None:
    output, _ = network
    A, B = numbers(output, "network trained on A")
    assert A > 95
    assert B < 50
    assert numbers(output, "with the adapter trained on B")[1] > 95
    assert numbers(output, "adapter switched off") == [A, B]
    assert numbers(output, "plain network, merged weights")[1] > 95
    assert numbers(output, "largest difference of the outputs, merged and not:")[0] < 1e-3
    trainable, total = numbers(output, "trained")
    assert trainable == 4 * (25 + 16) + 4 * (16 * 25 + 32) + 4 * (32 + 4)
    assert total == trainable + (16 * 25 + 16) + (32 * 16 * 25 + 32) + (4 * 32 + 4)


def test_the_merged_file_loads_where_there_is_no_lorakit(network: tuple[str, Path]) -> None:
    code = (
        "import sys, torch\n"
        "state = torch.load(sys.argv[1], weights_only=True)\n"
        "print(*sorted(state), *[m for m in sys.modules if m.startswith('lorakit')])\n"
    )
    command = [sys.executable, "-c", code, str(network[1] / "merged.pth")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    names = [f"{layer}.{part}" for layer in ("conv1", "conv2", "head") for part in ("bias", "weight")]
    assert result.stdout.split() == names, result.stderr


def test_the_readme_shows_what_the_programs_print(toy: str, network: tuple[str, Path]) -> None:
    """Word for word, but for the last digits, which differ from one processor to the next."""
    blocks = re.findall(r"^```text\n(.*?)^```", (EXAMPLES / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    words = [re.sub(r"\d[\d.,e+-]*", "#", block).split() for block in blocks]
    assert words == [re.sub(r"\d[\d.,e+-]*", "#", output).split() for output in (toy, network[0])]
