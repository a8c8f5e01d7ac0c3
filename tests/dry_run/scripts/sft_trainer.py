"""TRL's SFTTrainer with LoRA, and a tokenizer that is trained on the spot."""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

texts = [f"sentence {number} of a small data set, with words enough for a few tokens" for number in range(64)]
tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<pad>", "</s>"]))
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
config = LlamaConfig(
    vocab_size=len(fast),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
    args=SFTConfig(
        output_dir=sys.argv[1],
        per_device_train_batch_size=4,
        max_steps=3,
        max_length=32,
        logging_steps=1,
        save_strategy="no",
        bf16=True,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=fast,
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
print("allocated", torch.cuda.max_memory_allocated(), "reserved", torch.cuda.max_memory_reserved())
