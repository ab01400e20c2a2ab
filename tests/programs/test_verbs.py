"""What is done with a finished run: answers, scores, a plain model, a page; every verb's help."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import ROWS, Call, events, everything
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.cli.main import VERBS


class TestUsing:
    """What is done with a finished run."""

    @pytest.mark.parametrize("part", ["", "adapter", "checkpoint-50"])
    def test_generate(self, run: Path, lorakit: Call, part: str) -> None:
        question, answer = ROWS[0]
        status, out, err = lorakit("generate", run / part, question, "--max-new-tokens", 48)
        assert (status, out) == (0, f"{answer}\n"), err

    def test_generate_reads_lines(self, run: Path, lorakit: Call, typed: Callable[[str], None]) -> None:
        typed("\n".join(["", *(question for question, _ in ROWS), "  "]))
        status, out, _ = lorakit("generate", run, "--json", "--max-new-tokens", 48)
        assert status == 0
        assert json.loads(out) == [{"prompt": q, "answer": a} for q, a in ROWS]

    def test_generate_without_a_prompt(self, run: Path, lorakit: Call, typed: Callable[[str], None]) -> None:
        typed("\n")
        status, out, err = lorakit("generate", run)
        assert (status, out) == (2, "")
        assert err.startswith("error[E-USAGE]: there is no prompt")

    def test_the_base_model_knows_nothing(self, tiny_llama: Path, lorakit: Call) -> None:
        status, out, _ = lorakit("generate", tiny_llama, ROWS[0][0], "--max-new-tokens", 8, "--json")
        assert status == 0
        assert json.loads(out)[0]["answer"] != ROWS[0][1]

    def test_a_model_that_is_nowhere(self, tmp_path: Path, lorakit: Call) -> None:
        status, out, err = lorakit("generate", tmp_path / "runs" / "missing", "Hi")
        assert (status, out) == (4, "")
        assert err.startswith("error[E-MODEL]: ")
        assert str(tmp_path / "runs" / "missing") in err

    def test_chat(self, run: Path, lorakit: Call, typed: Callable[[str], None]) -> None:
        (first, one), (second, other) = ROWS[:2]
        typed(f"{first}\n/new\n{second}\n")  # and the end of the input
        status, out, err = lorakit("chat", run, "--max-new-tokens", 48)
        assert (status, out) == (0, f"{one}\n{other}\n")
        assert err.count("> ") == 4

    def test_chat_remembers_until_new(self, run: Path, lorakit: Call, typed: Callable[[str], None]) -> None:
        from lorakit.data.sample import Message
        from lorakit.evals.session import open_session

        typed(f"{ROWS[0][0]}\nAnd now?\n\nnot read\n")
        status, out, _ = lorakit("chat", run, "--max-new-tokens", 48)
        assert status == 0
        session = open_session(str(run))
        turns = (
            *session.conversation(ROWS[0][0]),
            Message("assistant", ROWS[0][1]),
            Message("user", "And now?"),
        )
        (second,) = session.answer([turns], max_new_tokens=48)
        assert out == f"{ROWS[0][1]}\n{second}\n"

    def test_evaluate(self, run: Path, folder: Path, lorakit: Call) -> None:
        data = folder / "train.jsonl"
        status, out, _ = lorakit("evaluate", run, data, "--json", "--max-new-tokens", 48)
        assert status == 0
        found, logged = json.loads(out), events(run, "eval")[-1]
        assert found.keys() == {"rows", "loss", "perplexity", "exact_match", "field_f1"}
        assert (found["rows"], found["exact_match"], found["field_f1"]) == (len(ROWS), 1.0, 1.0)
        assert found["loss"] == pytest.approx(logged["loss"], abs=0.02)  # the best precision, not fp32
        status, out, _ = lorakit("evaluate", run, data, "--json", "--no-generate", "--max-samples", 2)
        assert json.loads(out).keys() == {"rows", "loss", "perplexity"}
        assert json.loads(out)["rows"] == 2

    def test_merge(self, run: Path, lorakit: Call, tmp_path: Path) -> None:
        out = tmp_path / "models" / "merged"
        status, stdout, err = lorakit("merge", run, out, "--json")
        assert status == 0, err
        result = json.loads(stdout)
        certificate = json.loads((out / "merge_certificate.json").read_text())
        assert result == {"merged": str(out), **{k: v for k, v in certificate.items() if k != "adapter"}}
        assert (certificate["dtype"], certificate["inputs"], certificate["top1_agreement"]) == ("fp32", 5, 1.0)
        assert 0 < certificate["mean_logit_difference"] <= certificate["max_logit_difference"] < 1e-3
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        question, answer = ROWS[2]
        ids = tokenizer.apply_chat_template(
            [{"role": "system", "content": "Address to JSON."}, {"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        new = model.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == answer

        before = everything(out)
        status, stdout, err = lorakit("merge", run, out)
        assert (status, stdout) == (8, "")
        assert str(out) in err
        assert everything(out) == before

    def test_merge_needs_an_adapter(self, tiny_llama: Path, lorakit: Call, tmp_path: Path) -> None:
        status, _, err = lorakit("merge", tiny_llama, tmp_path / "merged")
        assert status == 4
        assert "is neither an adapter folder nor a run directory" in err
        assert not (tmp_path / "merged").exists()

    def test_a_certificate_on_given_rows(self, run: Path, folder: Path, lorakit: Call, tmp_path: Path) -> None:
        status, stdout, err = lorakit(
            "merge", run, tmp_path / "merged", "--dtype", "bf16", "--inputs", folder / "train.jsonl", "--json"
        )
        assert status == 0, err
        result = json.loads(stdout)
        assert result["inputs"] == 4 and result["tokens"] > 100
        assert 1e-4 < result["max_logit_difference"] < 5  # eight bits of precision on a sharpened output

    def test_convert_to_a_lower_rank(self, run: Path, lorakit: Call, tmp_path: Path) -> None:
        status, stdout, err = lorakit("convert", run, tmp_path / "same", "--json")
        assert status == 0, err
        assert json.loads(stdout)["largest_error"] == 0
        errors = []
        for rank in (2, 8):
            status, stdout, err = lorakit("convert", run, tmp_path / f"r{rank}", "--rank", rank, "--json")
            assert status == 0, err
            errors.append(json.loads(stdout)["largest_error"])
            assert json.loads((tmp_path / f"r{rank}" / "adapter_config.json").read_text())["r"] == rank
        assert errors[0] > errors[1] > 0
        status, stdout, err = lorakit("convert", run, tmp_path / "same")
        assert (status, stdout) == (8, "")
        answers = [lorakit("generate", name, ROWS[1][0])[1] for name in (run, tmp_path / "same")]
        assert answers[0] == answers[1] == ROWS[1][1] + "\n"

    def test_another_base_is_refused_unless_allowed(
        self, run: Path, model_folder: Path, lorakit: Call, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(model_folder, other)
        model = AutoModelForCausalLM.from_pretrained(other)
        model.model.layers[0].mlp.up_proj.weight.data *= 1.01
        model.save_pretrained(other)
        status, stdout, err = lorakit("generate", run, "x", "--base", other)
        assert (status, stdout) == (4, "")
        assert "the adapter was trained on another base model: its weights differ" in err
        assert lorakit("generate", run, "x", "--base", other, "--any-base")[0] == 0

    def test_inspect(self, run: Path, lorakit: Call) -> None:
        status, stdout, _ = lorakit("inspect", run)
        assert status == 0
        assert "model.layers.0.self_attn.q_proj" in stdout

    def test_report(self, run: Path, lorakit: Call, tmp_path: Path) -> None:
        copy = tmp_path / "moved"
        shutil.copytree(run, copy)
        (copy / "report.html").unlink()
        status, out, _ = lorakit("report", copy)
        assert (status, out) == (0, f"{copy / 'report.html'}\n")
        assert (copy / "report.html").read_text() == (run / "report.html").read_text()
        status, _, err = lorakit("report", tmp_path)
        assert status == 2
        assert "is not the directory of a run" in err

    def test_env(self, lorakit: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
        status, out, _ = lorakit("env", "--json")
        assert status == 0
        found = json.loads(out)
        assert {"device", "computes_in", "cores", "memory_gb", "python", "cache", "lorakit"} <= found.keys()
        assert found["torch"] == torch.__version__
        assert "fp32" in found["computes_in"]
        assert found["cores"] == os.cpu_count()


class TestHelp:
    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_explains_itself(self, verb: str, lorakit: Call) -> None:
        status, out, err = lorakit(verb, "-h")
        assert (status, err) == (0, "")
        assert out.startswith(f"Usage: lorakit {verb} ")
        assert lorakit(verb, "--help")[1] == out
        assert max(map(len, out.splitlines())) <= 80

    def test_all_verbs_are_there(self) -> None:
        assert len(VERBS) >= 9
