"""A compiled model in transformers' Trainer, which looks at signatures and lets the model compute its loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import graphlocal
from graphlocal.torchvision_operators import declare_operators

declare_operators()
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Sums(Dataset):
    """Token sequences, labelled by a property of theirs."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        tokens = torch.randint(50, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.sum() % 3}


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: nn.Module = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            **sizes, intermediate_size=32, max_position_embeddings=12, num_labels=3, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    return model


def trained(model: nn.Module, folder: str, **options: Any) -> tuple[list[float], float]:
    """The losses of the steps, and of an evaluation afterwards."""
    arguments = transformers.TrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=8, report_to=[], logging_steps=1, use_cpu=True,
        disable_tqdm=True, save_strategy="no", learning_rate=1e-2, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Sums(), eval_dataset=Sums())
    trainer.train()
    trainer.save_model(folder)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()["eval_loss"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 3}], ids=str)
def test_the_trainer_trains_a_compiled_model_as_it_trains_the_model(options, tmp_path):
    model = bert()
    example = {key: value.unsqueeze(0).expand(4, *value.shape).clone() for key, value in Sums()[0].items()}
    local = graphlocal.compile(copy.deepcopy(model), example_inputs=example, rule="backprop")
    losses, evaluated = trained(local, str(tmp_path / "local"), **options)
    expected, of_model = trained(model, str(tmp_path / "model"), **options)
    assert len(losses) == len(expected) > 1
    assert losses == pytest.approx(expected, rel=0.02 if options.get("bf16") else 1e-4)
    assert evaluated == pytest.approx(of_model, rel=0.02 if options.get("bf16") else 1e-4)
    assert local.compiled.execution._passes  # lowered, under autocast too
