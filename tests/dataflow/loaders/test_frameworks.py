"""Lightning, Accelerate and the Trainer of transformers, as they are: two ranks, stopped in the middle of an epoch.

Each framework runs in a process of its own, which imports it once and forks the ranks. They meet through a file, so no
port is needed. A rank notes the samples of each step; what it notes after a resume must be what an uninterrupted run
noted there.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

RANKS, LENGTH, GLOBAL_BATCH = 2, 40, 8
STEPS_AN_EPOCH = LENGTH // GLOBAL_BATCH
SAVED_AT = STEPS_AN_EPOCH + 2


def open_loader(**options):
    from dataflow import DataLoader, ElasticBatchSampler

    samples = Rows()
    sampler = ElasticBatchSampler(samples, GLOBAL_BATCH, seed=3, shuffle="full")
    return DataLoader(samples, batch_sampler=sampler, num_workers=1, **options)


class Rows:
    """Sample i is its number, as the input and the target of a regression."""

    def __len__(self):
        return LENGTH

    def __getitem__(self, index):
        import torch

        return {"x": torch.tensor([float(index)]), "labels": torch.tensor([float(index)])}


def numbers_of(batch):
    return [int(number) for number in batch["x"][:, 0]]


def run_lightning(folder, rank):
    import pytorch_lightning as lightning
    import torch
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(numbers_of(batch))
            return self.layer(batch["x"] / LENGTH).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    def fit(loader, from_checkpoint=None, **options):
        model = Model()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=RANKS, strategy="ddp", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, **options,
        )  # fmt: skip
        trainer.fit(model, loader, ckpt_path=from_checkpoint)
        return model.seen

    def interrupt(open_loader, name, saved_at, when, **options):
        whole = fit(open_loader(), max_epochs=2, enable_checkpointing=False, **options)
        fit(open_loader(), max_steps=saved_at, callbacks=[ModelCheckpoint(folder, name, **when)], **options)
        # The first rank has saved for all.
        resumed = fit(open_loader(), folder / f"{name}.ckpt", max_epochs=2, enable_checkpointing=False, **options)
        assert resumed == whole[saved_at:]
        return whole, resumed

    middle, end = {"every_n_train_steps": SAVED_AT}, {"every_n_train_steps": STEPS_AN_EPOCH}
    whole, resumed = interrupt(open_loader, "own", SAVED_AT, middle, use_distributed_sampler=False)
    dealt, _ = interrupt(plain_loader, "dealt", SAVED_AT, middle)
    # Behind an epoch it makes the iterator before it sets the sampler's epoch, and the checkpoints of epochs, which it
    # keeps by default, leave out the loader's state.
    for name, when in (("last", end), ("epoch", {"every_n_epochs": 1})):
        interrupt(open_loader, f"own-{name}", STEPS_AN_EPOCH, when, use_distributed_sampler=False)
        interrupt(plain_loader, f"dealt-{name}", STEPS_AN_EPOCH, when)
    return {"whole": whole, "resumed": resumed, "dealt": dealt[:STEPS_AN_EPOCH]}


def plain_loader():
    from dataflow import DataLoader

    return DataLoader(Rows(), batch_size=GLOBAL_BATCH // RANKS, shuffle=True, num_workers=1)


def run_accelerate(folder, rank):
    import torch
    from accelerate import Accelerator

    def epochs(loader, accelerator, model, optimizer):
        for batch in loader:
            accelerator.backward(model(batch["x"] / LENGTH).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            yield numbers_of(batch)

    def begin():
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(1, 1)
        loader, model, optimizer = accelerator.prepare(
            open_loader(), model, torch.optim.SGD(model.parameters(), lr=1e-3)
        )
        return accelerator, (loader, accelerator, model, optimizer)

    accelerator, job = begin()
    whole = [seen for _ in range(2) for seen in epochs(*job)]
    accelerator, job = begin()
    first = [*epochs(*job)]
    for step, seen in enumerate(epochs(*job), start=STEPS_AN_EPOCH + 1):
        first.append(seen)
        if step == SAVED_AT:
            accelerator.save_state(folder / "middle")
            accelerator.wait_for_everyone()  # each rank writes the loader's state, the same, to the same file
            break
    accelerator, job = begin()
    accelerator.load_state(folder / "middle")
    resumed = [*epochs(*job)]
    dealt = [numbers_of(batch) for batch in accelerator.prepare(plain_loader())]
    return {"whole": whole, "resumed": resumed, "dealt": dealt}


def run_trainer(folder, rank):
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    # With `use_cpu` the checkpoints name a device that torch could not load from at first, also without our loader.
    torch.serialization.register_package(5, lambda storage: None, lambda data, at: data if at == "cpu:0" else None)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen = []

        def forward(self, x, labels):
            self.seen.append(numbers_of({"x": x}))
            return {"loss": (self.layer(x) / LENGTH).square().mean()}

    class Job(Trainer):
        def get_train_dataloader(self):
            return open_loader()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            control.should_training_stop = state.global_step == SAVED_AT + 1
            return control

    def train(kind, callbacks=(), resume=None, **options):
        model = Model()
        arguments = TrainingArguments(
            str(folder), num_train_epochs=2, use_cpu=True, report_to=[], disable_tqdm=True,
            per_device_train_batch_size=GLOBAL_BATCH // RANKS, logging_strategy="no", **options,
        )  # fmt: skip
        kind(model, arguments, train_dataset=Rows(), callbacks=list(callbacks)).train(resume_from_checkpoint=resume)
        return model.seen

    whole = train(Job, save_strategy="no")
    train(Job, [Stop()], save_strategy="steps", save_steps=SAVED_AT)
    resumed = train(Job, resume=str(folder / f"checkpoint-{SAVED_AT}"), save_strategy="no")
    return {"whole": whole, "resumed": resumed}


JOBS = {"lightning": run_lightning, "accelerate": run_accelerate, "trainer": run_trainer}


def run_rank(framework, folder, rank):
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = JOBS[framework](folder, rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(framework, folder):
    # The address is never used: the ranks have met when a framework looks for it.
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    __import__({"lightning": "pytorch_lightning", "trainer": "transformers.trainer"}.get(framework, framework))
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(framework, Path(folder), rank)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(*sys.argv[1:])


@pytest.mark.parametrize("framework", sorted(JOBS))
def test_two_ranks_resume_in_the_middle_of_an_epoch(framework, tmp_path):
    if framework == "trainer" and tuple(map(int, version("torch").split(".")[:2])) < (2, 6):
        pytest.skip("the Trainer itself resumes with torch 2.6 and later only")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", __file__, framework, str(tmp_path)],
        capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path, env=os.environ | offline,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    steps = [sorted(number for rank in found for number in rank["whole"][step]) for step in range(2 * STEPS_AN_EPOCH)]
    for epoch in (steps[:STEPS_AN_EPOCH], steps[STEPS_AN_EPOCH:]):
        assert sorted(number for step in epoch for number in step) == list(range(LENGTH))
    for rank in found:
        assert rank["resumed"] == rank["whole"][SAVED_AT:]
    if "dealt" in found[0]:  # torch's own samplers are dealt to the ranks by the framework
        assert sorted(number for rank in found for step in rank["dealt"] for number in step) == list(range(LENGTH))
