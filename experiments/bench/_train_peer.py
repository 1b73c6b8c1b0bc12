"""The peer of the training benchmark: transformers' ``Trainer`` on a PEFT model, in a process of its own.

``python -m experiments.bench._train_peer fp32|bf16 JOB.json``; apart from ``train.py``, so that nothing of ours takes
memory or time in it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from sam.models.base import load
from sam.models.device import device_of
from sam.models.spec import BaseSpec
from sam.results import peak_memory_mb


def train(half: bool, job: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Seconds of ``Trainer.train``, the loss of each step, and the process's peak memory in MiB."""
    recipe, rates = job["recipe"], job["rates"]
    base = load(BaseSpec.from_config(job["base"]), device_of(job["trainer"]["accelerator"]))
    torch.manual_seed(recipe["seed"])
    config = LoraConfig(r=recipe["r"], lora_alpha=recipe["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    net = get_peft_model(base.model, config)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe["lr"], betas=(0.9, 0.98), weight_decay=recipe["weight_decay"], fused=True
    )
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=base.device == "cpu",
        bf16=half,
        per_device_train_batch_size=recipe["batch_size"],
        num_train_epochs=1,
        max_grad_norm=recipe["clip"],
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    base.tokenizer.pad_token = base.tokenizer.pad_token or base.tokenizer.eos_token
    trainer = Trainer(
        net,
        arguments,
        data_collator=DataCollatorForSeq2Seq(base.tokenizer, padding=True, pad_to_multiple_of=8),
        train_dataset=[row(prefix + ids, answer) for prefix, examples in job["plan"] for ids, answer in examples],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step])),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"seconds": seconds, "losses": losses, "peak_mb": peak_memory_mb()}


def row(ids: list[int], answer: int) -> dict[str, list[int]]:
    """An example as transformers takes it: the loss is on the last ``answer`` tokens."""
    labels = [-100] * (len(ids) - answer) + ids[-answer:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(train(sys.argv[1] == "bf16", json.loads(Path(sys.argv[2]).read_text()), scratch)))
