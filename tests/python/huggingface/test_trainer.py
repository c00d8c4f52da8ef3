"""transformers' Trainer over converted models: one process, and DDP with experts spread over ranks as torchrun starts them."""

import anabranch
import pytest
import torch
import transformers
from models import VOCABULARY, make_model
from ranks import preload, run_as_torchrun

preload("transformers.trainer", "peft")


def make_trainer(model, folder, ranks, seed, resume_from=None, **options):
    from anabranch.trainer import MoECallback

    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, VOCABULARY, (64, 9), generator=generator)
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4 // ranks, learning_rate=1e-2, max_grad_norm=0.5, seed=seed,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    rows = [{"input_ids": text, "labels": text} for text in texts]
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[MoECallback(resume_from)])


def make(kind, seed):
    """All of a model is trained, or LoRA on its attention and experts."""
    model = anabranch.convert(make_model("olmoe", seed, experts=8))
    if kind == "whole":
        return model
    import peft
    from anabranch.lora import lora_config

    torch.manual_seed(seed)
    return peft.get_peft_model(model, lora_config(r=2, lora_alpha=8, target_modules=["q_proj", "moe.experts"]))


def losses_of(trainer, since=0):
    return [log["loss"] for log in trainer.state.log_history if log.get("step", 0) > since and "loss" in log]


def resumed(kind, folder, size, seed, checkpoint):
    """The losses behind a checkpoint, of a model that begins otherwise."""
    again = make(kind, seed + 1)
    if kind == "lora":  # whose frozen weights the checkpoint of peft's does not replace
        again.get_base_model().load_state_dict(make(kind, seed).get_base_model().state_dict())
    trainer = make_trainer(again, folder, size, seed, f"{checkpoint}/checkpoint-3", max_steps=6, save_strategy="no")
    trainer.train(resume_from_checkpoint=f"{checkpoint}/checkpoint-3")
    return losses_of(trainer, since=3)


def run(kind, size, folder, seed):
    """Six steps, saved after three; then from there on again."""
    model = make(kind, seed)
    trainer = make_trainer(
        model, folder, size, seed, max_steps=6, save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    best = trainer.state.best_model_checkpoint
    if kind == "whole":
        assert_same_weights_of(model, best)
        model.save_pretrained(f"{folder}/end")
        assert_same_weights_of(model, f"{folder}/end")
        if size > 1 and torch.distributed.get_rank() == 0:  # where the others are not
            with pytest.raises(RuntimeError, match=r"call model\.save_pretrained\(folder\) on every rank"):
                trainer.save_model()
    else:
        assert_same_adapters_of(model, best, seed)
    return losses_of(trainer), norms, resumed(kind, folder, size, seed, folder)


def assert_same_weights_of(model, folder):
    """Plain transformers loads them from there, and they are the model's."""
    loaded = anabranch.convert(transformers.AutoModelForCausalLM.from_pretrained(folder))
    for (name, value), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(value, other), name


def assert_same_adapters_of(model, folder, seed):
    from anabranch.lora import load_adapters

    loaded = load_adapters(anabranch.convert(make_model("olmoe", seed, experts=8)), folder)
    for (name, value), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(value, other), name


def on_ranks(rank, size, folder, seed, kinds):
    """Of each kind what `run` returns, and the losses behind the checkpoint of one process."""
    transformers.logging.set_verbosity_error()
    torch.distributed.init_process_group("gloo")
    found = []
    for kind in kinds:
        mine = f"{folder}/{kind} {size}"
        found.append((*run(kind, size, mine, seed), resumed(kind, f"{mine} more", size, seed, f"{folder}/{kind} 1")))
    return found


def test_ddp_with_spread_experts_trains_as_one_process(tmp_path, seed):
    """From one process's checkpoint, and one process from the ranks', they go on too."""
    alone = {kind: run(kind, 1, f"{tmp_path}/{kind} 1", seed) for kind in ("whole", "lora")}
    for size, kinds in ((2, ["whole"]), (4, ["whole", "lora"])):
        for of_rank in run_as_torchrun(size, on_ranks, str(tmp_path), seed, kinds):
            for kind, (losses, norms, own, from_alone) in zip(kinds, of_rank, strict=True):
                # Adam divides by gradients' roots, which magnifies rounding.
                assert losses == pytest.approx(alone[kind][0], rel=1e-3), (kind, size)
                assert norms == pytest.approx(alone[kind][1], rel=1e-2), (kind, size)
                assert own == pytest.approx(losses[3:], rel=1e-4), (kind, size)
                assert from_alone == pytest.approx(alone[kind][0][3:], rel=1e-3), (kind, size)
    for kind, (losses, _, own) in alone.items():
        assert own == pytest.approx(losses[3:], rel=1e-4), kind
        more = resumed(kind, f"{tmp_path}/{kind} more", 1, seed, f"{tmp_path}/{kind} 4")
        assert more == pytest.approx(losses[3:], rel=1e-3), kind


def test_deepspeed_is_refused(tmp_path, seed):
    from anabranch.trainer import MoECallback

    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    arguments.deepspeed = "zero.json"
    with pytest.raises(ValueError, match="each rank has experts of its own"):
        MoECallback().on_init_end(arguments, None, None, model=make_model("olmoe", seed))

    class DeepSpeedEngine(torch.nn.Module):
        pass

    DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"
    with pytest.raises(TypeError, match="DeepSpeedEngine of DeepSpeed"):
        anabranch.finish_gradients(DeepSpeedEngine())
