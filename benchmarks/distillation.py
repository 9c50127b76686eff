"""Distillation on the server: FedDF with its teachers' outputs computed once, against teachers run on every batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Clock, Side, make_model, this_side, told
from runs import run_until, settings_of
from torch import nn

from fedkd import run
from fedkd.server.runtime import Event
from strategies.feddf import FedDF

REAL = "fashion_mnist.npz"
PROXY, STEPS = 5_000, 400
CLIP = 5.0


def distilled(side: Side, clock: Clock) -> dict[str, Any]:
    """Ours, in float32 or bf16."""
    return measure(side, clock, "feddf")


def reevaluated(side: Side, clock: Clock) -> dict[str, Any]:
    """The same run with another `distill`, and with the C library's allocator as it is by default."""
    run.keep_freed_memory = lambda: None
    return measure(side, clock, "distillation:Reevaluated")


def measure(side: Side, clock: Clock, strategy: str) -> dict[str, Any]:
    """Run FedDF; take the seconds of its distillations, and the student's accuracy after the first round."""
    real = Path(os.environ.get("FEDKD_DATA", "")) / REAL
    quick = told()["quick"]
    settings = settings_of(side, clock.total)
    settings |= {
        "partition": {"name": "dirichlet", "alpha": 0.5, "clients": side.load.clients, "min_samples": 32},
        "proxy": {"source": "held-out", "size": 256 if quick else PROXY},
        "strategy": {"name": strategy, "steps": 4 if quick else STEPS},
        "client": {"epochs": 1, "batch_size": side.load.batch, "lr": side.load.lr},
    }
    on_real = real.exists() and not quick
    if on_real:
        settings["data"] = {"source": f"npz:{real.resolve()}"}
    settings["system"]["server_precision"] = told().get("precision", "fp32")
    settings["system"] |= told().get("system", {})
    settings["run"]["evaluate_every"] = 1
    seconds, accuracy = [], []

    def heard(event: Event) -> bool:
        seconds.append(event["seconds"]["distill"])
        accuracy.append(event["accuracy"])
        clock.tick()
        return clock.over

    run_until(settings, heard)
    return clock.result() | {"seconds": seconds[-clock.rounds :], "accuracy": accuracy[:1], "real": on_real}


@dataclass(kw_only=True)
class Reevaluated(FedDF):
    """FedDF as in its authors' code: all teachers see every batch; default memory layout."""

    def distill(self) -> None:
        """Distil the ensemble into the student."""
        torch.manual_seed(0)
        load, (arch,) = this_side().load, self.students
        data = self.server.proxy.data
        x = data.gather(torch.arange(len(data))).x.clone(memory_format=torch.contiguous_format)
        members: list[nn.Module] = []
        for upload in self.members:
            member = make_model(load)
            member.load_state_dict(upload.state)
            members.append(member.eval())
        student = make_model(load)
        student.load_state_dict(self.students[arch])
        student.train()
        optimizer = torch.optim.Adam(student.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        done = 0
        while done < self.steps:
            for rows in torch.randperm(len(x)).split(self.batch_size)[: self.steps - done]:
                batch = x[rows]
                with torch.no_grad():
                    target = torch.stack([member(batch).logits for member in members]).mean(0)
                loss = F.kl_div(student(batch).logits.log_softmax(1), target.softmax(1), reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(student.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                done += 1
        self.students = {arch: dict(student.state_dict())}
