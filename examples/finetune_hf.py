#!/usr/bin/env python3
"""Trains a model of Hugging Face's transformers on a text with its experts spread over the ranks.

    torchrun --nproc-per-node 2 examples/finetune_hf.py --data FILE
    torchrun --nproc-per-node 8 examples/finetune_hf.py --data FILE --model DIR --device cuda

Without --model a small OLMoE with random weights that reads bytes. With --model a checkpoint that reads bytes as
tokens 0 to 255. The output folder is a checkpoint for plain transformers: AutoModelForCausalLM.from_pretrained.
"""

import argparse

import anabranch
import torch
import transformers
from lm_data import Text
from tqdm import tqdm


def make_model(options):
    if options.model:
        return transformers.AutoModelForCausalLM.from_pretrained(options.model)
    torch.manual_seed(options.seed)  # the same on every rank
    config = transformers.OlmoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=max(options.sequence_length, 128),
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.OlmoeForCausalLM(config)


def losses(model, inputs, targets):
    """Σ over this rank's tokens, in nats, and the family's own loss for balance, of the same tokens."""
    empty = len(inputs) == 0
    if empty:  # transformers takes no empty batch, and every rank takes part: a sequence that counts nothing
        inputs = inputs.new_zeros(1, inputs.shape[1])
        targets = torch.full_like(inputs, -100)
    output = model(input_ids=inputs, use_cache=False, output_router_logits=True)
    logits = output.logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, 0 * output.aux_loss if empty else output.aux_loss


@torch.no_grad()
def validate(model, text, world):
    """Mean loss over the held-out text, in nats a byte."""
    total = torch.zeros((), dtype=torch.float64)
    for inputs, targets in text.validation_batches():
        total += losses(model, inputs, targets)[0].cpu()
    world.all_reduce(total)
    return total.item() / (text.options.validation_sequences * text.options.sequence_length)


def train(options, world):
    text = Text(options, world)
    model = anabranch.convert(make_model(options).to(options.device))
    model.train()
    layers = [module for module in model.modules() if isinstance(module, anabranch.MoE)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    bar = tqdm(range(1, options.steps + 1), disable=world.rank != 0, unit="step")
    for step in bar:
        loss, balance_loss = losses(model, *text.training_batch(step))
        loss = loss / (options.batch_size * options.sequence_length)
        (loss * world.size + options.balance_loss * balance_loss).backward()
        anabranch.finish_gradients(model)
        anabranch.clip_gradient_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().double().cpu()
        world.all_reduce(loss)
        bar.set_postfix(loss=f"{loss.item():.3f}", imbalance=f"{layers[0].stats().imbalance:.2f}")
    loss = validate(model.eval(), text, world)
    if world.rank == 0:
        print(f"after {options.steps} steps: {loss:.3f} nats a byte of held-out text")
    model.save_pretrained(options.output)  # on every rank: the experts come together


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="text to train on (any file)")
    parser.add_argument("--model", help="a checkpoint to start from")
    parser.add_argument("--output", default="output", help="DIR for the trained model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: a GPU for each rank")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step, over all ranks")
    parser.add_argument("--sequence-length", type=int, default=128, help="bytes of a sequence")
    parser.add_argument("--validation-sequences", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--balance-loss", type=float, default=0.01, help="the coefficient of transformers' own")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.device == "cuda":
        options.device = f"cuda:{(anabranch.discover_rank().local_rank or 0) % torch.cuda.device_count()}"
        torch.cuda.set_device(options.device)
    train(options, anabranch.as_group())


if __name__ == "__main__":
    main()
