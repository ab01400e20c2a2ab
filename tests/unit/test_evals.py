"""Held-out scores and answers: independent of batching, and for any of the names a model goes by."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.attach import adapter_layers, add_lora_to_model
from lorakit.checkpoint.peft_format import find_adapter, save_adapter
from lorakit.data.encode import Row, encode_all, prompt_ids
from lorakit.data.rendering import Policy
from lorakit.data.sample import Message, Sample
from lorakit.data.templates import Template, find_template
from lorakit.errors import AdapterMismatchError, DataError, ModelError, UsageError
from lorakit.evals import evaluate as evaluation
from lorakit.evals import generate as generation
from lorakit.evals.evaluate import Evaluation, mean_loss
from lorakit.evals.objective import batching
from lorakit.evals.session import open_session
from lorakit.models.load import load_model, load_tokenizer
from lorakit.models.sources import locate
from lorakit.ops.loss import IGNORE


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> PreTrainedModel:
    return load_model(locate(str(tiny_llama)), precision="fp32")


@pytest.fixture(scope="module")
def double(tiny_llama: Path) -> PreTrainedModel:
    return load_model(locate(str(tiny_llama)), precision="fp32").double()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(locate(str(tiny_llama)))


QUESTIONS = ["Long " * 40, "a", "The quick brown fox", "é?", "12 Main St. " * 9, "user", "x y", "JSON! " * 20]
PROMPTS = [(Message("user", question),) for question in QUESTIONS]
SAMPLES = [
    Sample((Message("user", q), Message("assistant", f"{n}: {q[: 5 * n]}")), f"rows.jsonl:{n}")
    for n, q in enumerate(QUESTIONS, start=1)
]


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    return find_template(tokenizer)


def encode(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Row:
    (row,), _ = encode_all(tokenizer, [sample], Policy(2048), template_of(tokenizer))
    return row


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[Message, ...]],
    **settings: Any,
) -> list[str]:
    ids = [prompt_ids(tokenizer, Sample(prompt, ""), template_of(tokenizer)) for prompt in prompts]
    return generation.generate(model, tokenizer, ids, stop=[tokenizer.eos_token_id], **settings)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    cutoff_len: int,
    **settings: Any,
) -> Evaluation:
    template, answers = template_of(tokenizer), "max_new_tokens" in settings
    held_out = evaluation.hold_out(
        tokenizer, samples, template=template, cutoff_len=cutoff_len, answers=answers
    )
    return evaluation.evaluate(model, tokenizer, held_out, **settings)


class TestGenerate:
    def test_the_head_gets_contiguous_input(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """A strided input would make PyTorch copy the weight of the head once a row."""
        seen: list[bool] = []
        head = model.get_output_embeddings()
        watch = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
        generate(model, tokenizer, PROMPTS, max_new_tokens=3, batch_size=8)
        watch.remove()
        assert len(seen) == 3 and all(seen)
        assert not head._forward_pre_hooks  # undone

    @pytest.fixture(scope="class")
    def alone(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Each answer by plain argmax over the whole text so far: no batch, no padding, no cache."""
        answers = []
        for prompt in PROMPTS:
            ids = tokenizer(template_of(tokenizer).render(prompt, ask=True), return_tensors="pt").input_ids
            length = ids.shape[1]
            for _ in range(12):
                with torch.no_grad():
                    token = model(ids, use_cache=False).logits[0, -1].argmax()
                ids = torch.cat([ids, token.view(1, 1)], dim=1)
                if token == tokenizer.eos_token_id:
                    break
            answers.append(tokenizer.decode(ids[0, length:], skip_special_tokens=True))
        assert len(set(answers)) > len(answers) // 2
        return answers

    @pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
    def test_batches_change_no_answer_and_no_order(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, alone: list[str], batch_size: int
    ) -> None:
        progress: list[tuple[int, int]] = []
        answers = generate(
            model,
            tokenizer,
            PROMPTS,
            max_new_tokens=12,
            batch_size=batch_size,
            on_batch=lambda done, total: progress.append((done, total)),
        )
        assert answers == alone
        expected = [min(n, 8) for n in range(batch_size, 8 + batch_size, batch_size)]
        assert progress == [(done, 8) for done in expected]

    def test_no_more_tokens_than_asked_for(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, alone: list[str]
    ) -> None:
        short = generate(model, tokenizer, PROMPTS, max_new_tokens=3)
        for answer, whole in zip(short, alone, strict=True):
            assert whole.startswith(answer.rstrip("�"))
            assert len(answer) < len(whole) or len(whole) <= 3

    def test_training_mode_is_put_back(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model.train()
        generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1)
        assert model.training
        model.eval()
        generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1)
        assert not model.training

    def test_nothing_asked(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        assert generate(model, tokenizer, [], max_new_tokens=5) == []


def reference_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]
) -> float:
    total, count = 0.0, 0
    for sample in samples:
        row = encode(tokenizer, sample)
        with torch.no_grad():
            log_p = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for t, label in enumerate(row.labels[1:]):
            if label != IGNORE:
                total, count = total - float(log_p[t, label]), count + 1
    return total / count


class TestLoss:
    @pytest.mark.parametrize("batch_size", [1, 3, 100])
    def test_batches_do_not_change_it(
        self, double: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        rows = [encode(tokenizer, sample) for sample in SAMPLES]
        loss = mean_loss(double, tokenizer, rows, batch_size)
        assert loss == pytest.approx(reference_loss(double, tokenizer, SAMPLES), rel=1e-10)

    def test_padded_and_packed_agree(self, double: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        rows = [encode(tokenizer, sample) for sample in SAMPLES]
        packed = mean_loss(double, tokenizer, rows, 4)
        double.config.attention_dropout = 0.5  # of training alone; packed attention has none
        try:
            with batching(double, tokenizer, rows) as collate:
                assert not collate(rows[:2]).packed
            assert mean_loss(double, tokenizer, rows, 4) == pytest.approx(packed, rel=1e-10)
        finally:
            double.config.attention_dropout = 0.0

    def test_training_mode_is_put_back(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model.train()
        mean_loss(model, tokenizer, [encode(tokenizer, SAMPLES[0])], 1)
        assert model.training
        model.eval()


class TestEvaluate:
    def test_loss_alone(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        found = evaluate(model, tokenizer, SAMPLES, cutoff_len=2048, batch_size=3)
        assert found.loss == pytest.approx(reference_loss(model, tokenizer, SAMPLES), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(found.loss))
        assert found.scores() == {"rows": 8, "loss": found.loss, "perplexity": found.perplexity}
        assert found.answers is None

    def test_answers_are_scored(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        answers = generate(model, tokenizer, PROMPTS, max_new_tokens=4)
        right = [n % 2 == 0 and bool(answer.strip()) for n, answer in enumerate(answers)]
        samples = [
            Sample((*prompt, Message("assistant", answer if ok else "wrong")), "here")
            for prompt, answer, ok in zip(PROMPTS, answers, right, strict=True)
        ]
        found = evaluate(model, tokenizer, samples, cutoff_len=2048, batch_size=8, max_new_tokens=4)
        assert found.answers == tuple(answers)
        assert found.exact_match == sum(right) / 8 > 0
        assert found.field_f1 is None
        assert found.scores().keys() == {"rows", "loss", "perplexity", "exact_match"}

    def test_fields_are_scored_where_every_reference_is_an_object(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        samples = [Sample((*prompt, Message("assistant", '{"a": 1}')), "here") for prompt in PROMPTS[:2]]
        found = evaluate(model, tokenizer, samples, cutoff_len=2048, batch_size=8, max_new_tokens=2)
        assert (found.exact_match, found.field_f1) == (0.0, 0.0)

    def test_rows_beyond_the_cutoff(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        short = len(encode(tokenizer, SAMPLES[1]).ids)
        found = evaluate(model, tokenizer, SAMPLES[:2], cutoff_len=short, batch_size=2)
        assert (found.rows, found.data.truncated) == (2, 1)
        silent = Sample((Message("user", "a"), Message("assistant", "b", train=False)), "rows.jsonl:1")
        with pytest.raises(DataError, match="1 carry no loss"):
            evaluate(model, tokenizer, [silent], cutoff_len=short, batch_size=2)


SYSTEM = "Answer in JSON."


@pytest.fixture(scope="module")
def run_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as far as a session reads it: an adapter with random B, and its notes."""
    folder = tmp_path_factory.mktemp("run")
    model = load_model(locate(str(tiny_llama)), precision="fp32")
    add_lora_to_model(model, r=4, seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in adapter_layers(model).values():
        B = layer.adapter("default").lora_B
        B.data = 0.3 * torch.randn(B.shape, generator=generator)
    save_adapter(model, folder / "adapter", base_model=str(tiny_llama), notes={"system": SYSTEM})
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


class TestSession:
    def test_where_an_adapter_is(self, run_folder: Path, tiny_llama: Path) -> None:
        assert find_adapter(run_folder) == run_folder / "adapter"
        assert find_adapter(run_folder / "adapter") == run_folder / "adapter"
        assert find_adapter(tiny_llama) is None
        assert find_adapter(run_folder / "missing") is None

    @pytest.mark.parametrize("part", ["", "adapter"])
    @pytest.mark.parametrize("merge", [True, False])
    def test_a_run_and_its_adapter_are_the_same_model(
        self, run_folder: Path, tiny_llama: Path, part: str, merge: bool
    ) -> None:
        from peft import PeftModel

        session = open_session(str(run_folder / part), precision="fp32", merge=merge)
        assert session.adapter == run_folder / "adapter"
        assert session.source.path == tiny_llama.resolve()
        assert {layer.merged for layer in adapter_layers(session.model).values()} == {merge}
        oracle = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_llama), run_folder / "adapter"
        )
        torch.testing.assert_close(logits(session.model), logits(oracle.eval()), rtol=0, atol=1e-4)

    def test_a_base_model_alone(self, tiny_llama: Path, model: PreTrainedModel) -> None:
        session = open_session(str(tiny_llama), precision="fp32")
        assert (session.adapter, session.system) == (None, None)
        assert torch.equal(logits(session.model), logits(model))
        with pytest.raises(UsageError, match="is no adapter, so there is no base model to choose"):
            open_session(str(tiny_llama), base="another")

    def test_the_adapter_brings_its_system_message(self, run_folder: Path, tiny_llama: Path) -> None:
        session = open_session(str(run_folder))
        question = Message("user", "Hi")
        assert session.conversation("Hi") == (Message("system", SYSTEM), question)
        assert session.conversation("Hi", "Be kind.") == (Message("system", "Be kind."), question)
        assert session.conversation("Hi", "") == (question,)
        assert open_session(str(tiny_llama)).conversation("Hi") == (question,)

    def test_the_adapter_brings_its_template(self, run_folder: Path, tmp_path: Path, tiny_llama: Path) -> None:
        """Whatever the base's tokenizer says by then; a merged model gets it, too."""
        folder = self.copy(run_folder, tmp_path / "adapter")
        own = load_tokenizer(locate(str(tiny_llama)))
        used = find_template(own, "vicuna", default_system="Be brief. ")
        for name, text in used.files().items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "lorakit.json").write_text(json.dumps({"system": None, "template": used.notes()}))
        session = open_session(str(folder))
        assert session.template == used
        assert session.tokenizer.chat_template == used.source
        assert session.template.render(session.conversation("Hi"), ask=True) == "Be brief. USER: Hi ASSISTANT:"
        assert len(session.answer([session.conversation("Hi")], max_new_tokens=2)) == 1

    def copy(self, run_folder: Path, folder: Path, **changes: object) -> Path:
        folder.mkdir()
        for path in (run_folder / "adapter").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    @pytest.mark.parametrize("name", ["", None])
    def test_an_adapter_without_a_base(
        self, run_folder: Path, tiny_llama: Path, tmp_path: Path, name: str | None
    ) -> None:
        nameless = self.copy(run_folder, tmp_path / "adapter", base_model_name_or_path=name)
        with pytest.raises(ModelError, match="the adapter does not name its base model") as caught:
            open_session(str(nameless))
        assert (caught.value.place, caught.value.remedy) == (str(nameless), "add --base MODEL")
        given = open_session(str(nameless), base=str(tiny_llama), precision="fp32")
        named = open_session(str(run_folder), precision="fp32")
        assert torch.equal(logits(given.model), logits(named.model))

    @pytest.mark.parametrize("notes", [None, '{"system": 5}', "{}"])
    def test_an_adapter_from_elsewhere_has_no_system_message(
        self, run_folder: Path, tmp_path: Path, notes: str | None
    ) -> None:
        folder = self.copy(run_folder, tmp_path / "adapter")
        (folder / "lorakit.json").unlink()
        if notes is not None:
            (folder / "lorakit.json").write_text(notes)
        assert open_session(str(folder)).system is None

    @pytest.mark.parametrize("notes", ["no JSON", "[]"])
    def test_damaged_notes_are_an_error(self, run_folder: Path, tmp_path: Path, notes: str) -> None:
        folder = self.copy(run_folder, tmp_path / "adapter")
        (folder / "lorakit.json").write_text(notes)
        with pytest.raises(AdapterMismatchError, match=r"lorakit\.json"):
            open_session(str(folder))

    def test_an_adapter_of_another_model(self, run_folder: Path, tmp_path: Path, tiny_llama: Path) -> None:
        folder = self.copy(run_folder, tmp_path / "adapter", r=8)
        with pytest.raises(AdapterMismatchError, match="tensors do not fit this model"):
            open_session(str(folder))

    def test_a_name_that_means_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError):
            open_session(str(tmp_path / "missing"))
