"""The ground that other tests stand on: no network, and a tiny model that behaves like a real one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest


def test_only_this_machine_can_be_reached() -> None:
    with pytest.raises(AssertionError, match=r"a test tried to reach \('192\.0\.2\.1', 80\)"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def test_tiny_llama_is_a_chat_model(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 64)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("12 Rue de l'Été").input_ids) == "12 Rue de l'Été"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )
    ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
    assert model(**ids).logits.std() > 0.1
