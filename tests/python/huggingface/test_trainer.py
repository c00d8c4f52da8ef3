"""transformers' Trainer over converted models: one process, and DDP with experts spread over ranks under torchrun."""

import json
import sys

import anabranch
import pytest
import torch
import transformers
from jobs import ENVIRONMENT, SAME_PATH, TORCHRUN, run_job
from models import VOCABULARY, make_model


def make_trainer(model, folder, ranks, seed, **options):
    from anabranch.trainer import MoECallback

    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, VOCABULARY, (64, 9), generator=generator)
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4 // ranks, learning_rate=1e-2, max_grad_norm=0.5, seed=seed,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    rows = [{"input_ids": text, "labels": text} for text in texts]
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[MoECallback()])


def run(rank, size, folder, seed):
    """Six steps, saved after three; then from there on again."""
    model = anabranch.convert(make_model("olmoe", seed))
    trainer = make_trainer(
        model, f"{folder}/{size}", size, seed, max_steps=6, save_steps=3, eval_strategy="steps", eval_steps=3,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    best = trainer.state.best_model_checkpoint
    assert_same_weights_of(model, best)
    model.save_pretrained(f"{folder}/{size}/end")
    assert_same_weights_of(model, f"{folder}/{size}/end")

    again = anabranch.convert(make_model("olmoe", seed + 1))
    resumed = make_trainer(again, f"{folder}/{size}", size, seed, max_steps=6, save_strategy="no")
    resumed.train(resume_from_checkpoint=f"{folder}/{size}/checkpoint-3")
    of_resumed = [log["loss"] for log in resumed.state.log_history if log.get("step", 0) > 3 and "loss" in log]
    return losses, norms, of_resumed


def assert_same_weights_of(model, folder):
    """Plain transformers loads them from there, and they are the model's."""
    loaded = anabranch.convert(transformers.AutoModelForCausalLM.from_pretrained(folder))
    for (name, value), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_ddp_with_spread_experts_trains_as_one_process(tmp_path, seed):
    run_job(*TORCHRUN, __file__, tmp_path, seed, timeout=300, environment=ENVIRONMENT | SAME_PATH)
    alone = run(0, 1, tmp_path, seed)
    for rank in range(2):
        losses, norms, of_resumed = json.loads((tmp_path / f"{rank}.json").read_text())
        # Adam divides by gradients' roots, which magnifies rounding.
        assert losses == pytest.approx(alone[0], rel=1e-3)
        assert norms == pytest.approx(alone[1], rel=1e-2)
        assert of_resumed == pytest.approx(losses[3:], rel=1e-4)
    assert alone[2] == pytest.approx(alone[0][3:], rel=1e-4)


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = run(rank, 2, sys.argv[1], int(sys.argv[2]))
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump(found, file)
