"""The model card: the ``README.md`` of an adapter folder, in the model hub's conventions.

It says what the run's record holds and nothing else; what was not measured is named as not measured.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lorakit.report.numbers import dimensions, duration, measures, number
from lorakit.report.record import DataInfo, ModelInfo, RunRecord

_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "lora_dropout",
    "cutoff_len",
    "bf16",
    "fp16",
    "seed",
)


def model_card(record: RunRecord) -> str:
    """The card as Markdown with its YAML front matter."""
    sections = [
        f"---\n{_front_matter(record.info.model)}---",
        _summary(record),
        _training(record),
        _evaluation(record),
        _usage(record.info.model),
        _limits(record),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(model: ModelInfo) -> str:
    values: dict[str, Any] = {"library_name": "peft"}
    if base := model.hub_id:
        values |= {"base_model": base, "base_model_relation": "adapter"}
    values |= {"pipeline_tag": "text-generation", "tags": ["lora", "lorakit"]}
    if model.license:
        values["license"] = model.license
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # annotated too narrowly there
    yaml.dump(values, stream)
    return stream.getvalue()


def _summary(record: RunRecord) -> str:
    info = record.info
    name = Path(info.model.name).name
    lines = [f"# LoRA adapter for {_code(name)}", ""]
    base = f"A LoRA adapter for the language model {_code(info.model.hub_id or name)}"
    if adapter := info.adapter:
        base += (
            f": rank {adapter.r}, alpha {adapter.lora_alpha:g} (scaling {adapter.scaling:.4g}), "
            f"{adapter.trainable:,} trained weights, {adapter.percent:.2f} % of {adapter.total:,}"
        )
    lines.append(f"{base}. Trained with lorakit{f' {info.lorakit}' if info.lorakit else ''}.")
    if info.model.kind == "alias":
        lines += ["", f"The base was {_code(name)}: that model's weights in 4 bits (GGUF Q4_1), dequantised."]
    if info.status and info.status != "finished":
        lines += ["", f"**The run did not come to its end; its status is {_code(info.status)}.**"]
    if info.base_unchanged:
        lines += ["", "The base weights were compared before and after training and are unchanged."]
    return "\n".join(lines)


def _training(record: RunRecord) -> str:
    info = record.info
    lines = ["## Training", ""]
    if info.data.train:
        lines.append(f"Data: {_data(info.data.train)}.")
    if record.train:
        last = record.train[-1]
        took = f" The whole run took {duration(info.seconds)}." if info.seconds is not None else ""
        lines.append(
            f"Steps: {last.step:,}; the last logged training loss is {number(last.loss, '.4f')}.{took}"
        )
    if info.adapter and info.adapter.targets:
        rows = [
            (
                _code(target.name),
                f"{target.modules}",
                dimensions(target.shape),
                f"{target.parameters:,}",
            )
            for target in info.adapter.targets
        ]
        lines += ["", _table(("target", "modules", "weight shape", "trained weights"), rows)]
    settings = [(_code(key), _code(record.settings[key])) for key in _SETTINGS if _is_set(record, key)]
    if settings:
        lines += ["", _table(("setting", "value"), settings)]
    return "\n".join(lines)


def _evaluation(record: RunRecord) -> str:
    found = measures(record.before, record.after)
    point = record.after or record.before
    if not found or point is None:
        return "\n\n".join(["## Evaluation", "This adapter was not evaluated.", *_forgetting(record)])
    held_out = f"{number(point.rows)} held-out rows"
    if record.info.data.eval and record.info.data.eval.files:
        held_out += f" of {_files(record.info.data.eval)}"
    rows = [(measure.name, measure.before, measure.after) for measure in found]
    after = f"adapter (step {record.after.step})" if record.after else "adapter"
    measured = f"Measured on {held_out}:\n\n{_table(('', 'base model', after), rows)}"
    return "\n\n".join(["## Evaluation", measured, *_forgetting(record)])


def _forgetting(record: RunRecord) -> list[str]:
    if not (found := record.info.forgetting):
        return []
    base, adapter = number(found.base, ",.2f"), number(found.adapter, ",.2f")
    return [
        f"Perplexity on a text that has nothing to do with the task ({_code(found.text)}, {found.tokens:,} "
        f"tokens): {base} of the base model, {adapter} with the adapter."
    ]


def _usage(model: ModelInfo) -> str:
    base = repr(model.hub_id or "path/to/the/base/model")
    return f"""## How to use it

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

With lorakit:

```sh
lorakit generate path/to/this/folder "your prompt"
```"""


def _limits(record: RunRecord) -> str:
    measured = "anything beyond the rows and measures above: " if record.after else ""
    missing = "" if record.before else " The base model was not measured, so no gain can be stated."
    unlearned = " beyond that text" if record.info.forgetting else ""
    return (
        f"## Limits\n\nNot evaluated: {measured}other tasks and languages, safety, bias, robustness to "
        f"hostile prompts, and what the base model may have unlearned{unlearned}."
        f"{missing} The limits of the base model apply."
    )


def _data(data: DataInfo) -> str:
    words = f"{data.rows:,} rows"
    if data.files:
        words += f" of {_files(data)}"
    if data.tokens is not None:
        words += f", {data.tokens:,} tokens"
    if data.supervised_tokens is not None:
        words += f", {data.supervised_tokens:,} of them with loss"
    if data.truncated:
        words += f"; {data.truncated:,} rows were truncated"
    if data.dropped:
        words += f"; {data.dropped:,} rows were dropped"
    return words


def _files(data: DataInfo) -> str:
    """File names without their folders, which are nobody's business once the adapter is shared."""
    return ", ".join(_code(Path(name).name) for name in data.files)


def _is_set(record: RunRecord, key: str) -> bool:
    return record.settings.get(key) is not None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: object) -> str:
    """A value as inline code that cannot break out of it, or out of a table."""
    text = " ".join(str(value).replace("`", "'").split())
    return "`" + text.replace("|", "\\|") + "`"
