"""Hugging Face's Trainer on a data set in memory, with evaluation and saving."""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
rows = torch.randint(0, 512, (64, 64)).tolist()
data = Dataset.from_dict({"input_ids": rows, "labels": rows})
arguments = TrainingArguments(
    output_dir=sys.argv[1],
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_steps=4,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    save_steps=4,
    bf16=True,
    activation_checkpointing=True,
    report_to="none",
)
trainer = Trainer(
    model=AutoModelForCausalLM.from_config(config),
    args=arguments,
    train_dataset=data,
    eval_dataset=data.select(range(8)),
)
trainer.train()
print("allocated", torch.cuda.max_memory_allocated(), "reserved", torch.cuda.max_memory_reserved())
