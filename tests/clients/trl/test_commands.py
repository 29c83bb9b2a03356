"""`trl sft` on two ranks that it starts itself, begun by `python -m rehearsal_plugin.run`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

import trl

from tests.clients.trl.commands import ONE_TOKEN_KINDS, TRL, command, deepspeed_ranks, plain_ranks
from tests.helpers.clients.claims import assert_replay, assert_same_from
from tests.helpers.clients.runs import run_client, section_file

pytestmark = pytest.mark.clients

REWARD = ["--reward_funcs", "get_soft_overlong_punishment"]
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]


@pytest.mark.parametrize(
    ("data", "options", "passes"),
    [
        pytest.param("text", [], 1, id="plain"),
        pytest.param("text", ["--packing", "--packing_strategy", "wrapped"], 1, id="wrapped"),
        pytest.param("completion", [], 1, id="completion only"),
        pytest.param("chat", ["--assistant_only_loss"], 1, id="assistant only"),
        pytest.param("text", LORA, 1, id="LoRA"),
        pytest.param("text", ["--gradient_accumulation_steps", "2"], 2, id="accumulation"),
    ],
)
def test_rows_are_replayed_in_the_workers(
    tiny: Path, tmp_path: Path, data: str, options: list[str], passes: int
) -> None:
    given = command("sft", tiny / data, tiny / "model", [*plain_ranks(), *options])
    section = section_file(tmp_path)
    plain = run_client([*given, "--output_dir", tmp_path / "a"], tmp_path / "plain")
    replayed = run_client([*given, "--output_dir", tmp_path / "b"], tmp_path / "replayed", section=section)
    assert_replay(plain, replayed, passes=passes)
    assert ": 32 rows offered, 32 stored, " in replayed.printed or passes > 1


@pytest.mark.parametrize("stage", [2, 3])
def test_rows_are_replayed_under_deepspeed(tiny: Path, tmp_path: Path, stage: int) -> None:
    given = command("sft", tiny / "text", tiny / "model", deepspeed_ranks(tmp_path, stage))
    section = section_file(tmp_path)
    plain, replayed = (
        run_client([*given, "--output_dir", tmp_path / name], tmp_path / f"{name}_run", section=with_it, may_abort=True)
        for name, with_it in (("plain", None), ("replayed", section))
    )
    assert_replay(plain, replayed)


def test_pairs_are_replayed_whole_in_the_workers(tiny: Path, tmp_path: Path) -> None:
    program, *given = command("dpo", tiny / "pairs", tiny / "model", plain_ranks())
    section = section_file(tmp_path)
    plain = run_client([program, *given, "--output_dir", tmp_path / "a"], tmp_path / "plain")
    by_name = ["trl", *given, "--output_dir", tmp_path / "b"]
    replayed = run_client(by_name, tmp_path / "replayed", section=section)
    assert_replay(plain, replayed, parts=2)


def test_accelerate_launch_reaches_its_ranks(tiny: Path, tmp_path: Path) -> None:
    _, *given = command("sft", tiny / "text", tiny / "model", ["--output_dir", tmp_path / "out"])
    script = Path(trl.__file__).parent / "scripts" / "sft.py"
    launch = ["-m", "accelerate.commands.launch", *plain_ranks(), script, *given[1:]]
    plain = run_client(launch, tmp_path / "plain")
    section = section_file(tmp_path, padding=ONE_TOKEN_KINDS)
    assert_replay(plain, run_client(launch, tmp_path / "replayed", section=section))


def test_a_trainer_that_generates_ends_the_job(tiny: Path, tmp_path: Path) -> None:
    options = [*plain_ranks(), "--output_dir", tmp_path / "out", "--num_generations", "2", *REWARD]
    _, *given = command("grpo", tiny / "completion", tiny / "model", options)
    place = given.index("--max_length")
    run = run_client(
        [TRL, *given[:place], *given[place + 2 :]], tmp_path / "run", section=section_file(tmp_path), ranks=0
    )
    assert run.status != 0
    assert "GRPOTrainer trains on text that it generates" in run.printed


def test_a_resumed_run_goes_on_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    given = command(
        "sft", tiny / "text", tiny / "model", [*plain_ranks(), "--save_strategy", "steps", "--save_steps", "5"]
    )
    section = section_file(tmp_path)
    whole = run_client([*given, "--output_dir", tmp_path / "out"], tmp_path / "whole", section=section)
    checkpoint = tmp_path / "out" / "checkpoint-5"
    again = [*given, "--output_dir", tmp_path / "again", "--resume_from_checkpoint", checkpoint]
    assert_same_from(whole, run_client(again, tmp_path / "resumed", section=section), 5)


def test_rows_take_the_places_of_new_ones(tiny: Path, tmp_path: Path) -> None:
    given = command("sft", tiny / "text", tiny / "model", plain_ranks())
    section = section_file(tmp_path, mode="replace")
    plain = run_client([*given, "--output_dir", tmp_path / "a"], tmp_path / "plain")
    replayed = run_client([*given, "--output_dir", tmp_path / "b"], tmp_path / "replayed", section=section)
    assert_replay(plain, replayed, displaces=True)
