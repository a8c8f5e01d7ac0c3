"""A plain transformers loop."""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--batch", type=int, default=2)
parser.add_argument("--checkpointing", choices=("off", "on", "reentrant"), default="off")
parser.add_argument("--read-peaks", action="store_true")
args = parser.parse_args()

config = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    use_cache=False,
)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to("cuda")
if args.checkpointing != "off":
    model.gradient_checkpointing_enable({"use_reentrant": args.checkpointing == "reentrant"})
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(args.steps):
    if step == 1 and args.read_peaks:
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 2048, (args.batch, 128)).to("cuda")
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
print("allocated", torch.cuda.max_memory_allocated(), "reserved", torch.cuda.max_memory_reserved())
