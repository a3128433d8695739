"""Generating at scale: processes, galleries, previews, starts from pictures, exclusion, the gate, kills."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from diffalign.building import ready_model
from diffalign.cli import main
from diffalign.data.images import decode, to_tensor
from diffalign.data.prompts import Prompt
from diffalign.data.tables import read_table
from diffalign.errors import ConfigError, DataError
from diffalign.generation import GenerateConfig, Generated, generate_dataset
from diffalign.models import ModelSpec
from diffalign.sampling import Item, Sampler, sample
from diffalign.spec import validate
from tests.conftest import build_tiny, picture

PROMPTS = ["a red circle on a grey background", "a blue cross on a white background", "a pink square on a navy background"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


def settings(tiny: Path, prompts: Path, out: Path, **more: Any) -> GenerateConfig:
    base = {
        "model": {"path": str(tiny)}, "prompts": str(prompts), "images_per_prompt": 2, "shard_size": 2,
        "sampling": {"num_inference_steps": 2, "batch_size": 2}, "output_dir": str(out),
    }  # fmt: skip
    return validate(GenerateConfig, base | more)


def run(tiny: Path, prompts: Path, out: Path, rank: int = 0, world: int = 1, **more: Any) -> Generated:
    return generate_dataset(settings(tiny, prompts, out, **more), rank, world)


def rows(out: Path, table: str = "images") -> list[dict[str, Any]]:
    return read_table(out, table).to_pylist()


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_processes_share_the_shards_and_leave_the_same_bytes(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    run(tiny, prompts, tmp_path / "one")
    first = run(tiny, prompts, tmp_path / "two", 1, 2)
    assert (first.made, first.finished) == (2, False)
    second = run(tiny, prompts, tmp_path / "two", 0, 2)
    assert (second.made, second.images, second.finished) == (4, 6, True)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_equal_prompts_are_encoded_once_and_give_the_same_pictures(tiny: Path) -> None:
    model = ready_model(ModelSpec(path=str(tiny)))
    items = [Item(Prompt(p), k) for p in PROMPTS[:2] for k in range(3)]
    heard: list[int] = []
    encode = model.encode_prompts

    def counted(texts: Any) -> Any:
        heard.append(len(texts))
        return encode(texts)

    plain = sample(model, items, Sampler(num_inference_steps=3), 0)
    model.encode_prompts = counted  # type: ignore[method-assign]
    assert (plain.int() - sample(model, items, Sampler(num_inference_steps=3), 0, once=True).int()).abs().max() <= 1
    assert heard == [2]


def test_a_gallery_makes_the_same_prompts_and_seeds(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    other = build_tiny(tmp_path / "other", seed=1)
    done = run(tiny, prompts, tmp_path / "out", gallery=[{"path": str(other)}])
    found = rows(tmp_path / "out")
    assert done.images == len(found) == 12
    assert len({r["image_id"] for r in found}) == 12
    assert [r["model"] for r in found] == [str(tiny)] * 6 + [str(other)] * 6
    assert [(r["prompt"], r["k"]) for r in found[:6]] == [(r["prompt"], r["k"]) for r in found[6:]]
    alone = run(other, prompts, tmp_path / "alone")
    assert [r["sha256"] for r in rows(tmp_path / "alone")] == [r["sha256"] for r in found[6:]]
    assert alone.images == 6


def test_evaluation_prompts_are_left_out_however_they_are_written(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    bench = str(tmp_path / "bench.txt")
    Path(bench).write_text("A Red  circle, on a grey background.\n")
    with pytest.raises(DataError, match=r"1 of 3 prompts are evaluated on .*first 'a red circle .*=drop"):
        run(tiny, prompts, tmp_path / "out", exclude=[bench])
    assert not (tmp_path / "out").exists()
    done = run(tiny, prompts, tmp_path / "out", exclude=[bench], evaluation_prompts="drop")
    assert done.excluded == 1
    assert {r["prompt"] for r in rows(tmp_path / "out")} == set(PROMPTS[1:])
    with pytest.raises(ConfigError, match="none of the 3 prompts is left"):
        run(tiny, prompts, tmp_path / "no", exclude=[str(prompts)], evaluation_prompts="drop")
    assert run(tiny, prompts, tmp_path / "kept", exclude=[bench], evaluation_prompts="keep").images == 6


def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [float(np.asarray(i).mean()) for i in images]


def test_a_preview_picks_the_seeds_that_are_made_at_full_length(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    name = "tests.test_generate:brightness"
    preview = {"images_per_prompt": 5, "num_inference_steps": 1, "scorers": [name], "reward": {"brightness": 1.0}}
    run(tiny, prompts, tmp_path / "out", preview=preview)
    few, full = (
        run_all(tiny, prompts, tmp_path / n, {"num_inference_steps": steps, "batch_size": 2})
        for n, steps in (("f", 1), ("g", 2))
    )
    found = rows(tmp_path / "out")
    assert len(found) == 6
    for prompt in PROMPTS:
        light = [brightness([decode(few[prompt, k], "x")], [])[0] for k in range(5)]
        mine = [r for r in found if r["prompt"] == prompt]
        assert {r["k"] for r in mine} == {int(np.argmax(light)), int(np.argmin(light))}
        for r in mine:
            a, b = (np.asarray(decode(d, "x"), int) for d in (r["image"]["bytes"], full[prompt, r["k"]]))
            assert np.abs(a - b).max() <= 1
    run(tiny, prompts, tmp_path / "best", preview={**preview, "keep": "best"})
    assert {r["k"] for r in rows(tmp_path / "best")} != {r["k"] for r in found}
    with pytest.raises(ConfigError, match="at least images_per_prompt"):
        settings(tiny, prompts, tmp_path, preview={"images_per_prompt": 2}, images_per_prompt=3)
    with pytest.raises(ConfigError, match="no scorer gives 'score'"):
        run(tiny, prompts, tmp_path / "no", preview={**preview, "reward": {"score": 1}})


def run_all(tiny: Path, prompts: Path, out: Path, sampling: dict[str, int]) -> dict[tuple[str, int], bytes]:
    run(tiny, prompts, out, images_per_prompt=5, sampling=sampling)
    return {(r["prompt"], r["k"]): r["image"]["bytes"] for r in rows(out)}


def test_images_start_from_pictures_as_stock_pipelines_do(tiny: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    (tmp_path / "in").mkdir()
    for n, prompt in enumerate(PROMPTS[:2]):
        picture(n).save(tmp_path / "in" / f"{n}.png")
        (tmp_path / "in" / f"{n}.txt").write_text(prompt)
    more = {"start_from": {"path": str(tmp_path / "in"), "strength": [0.5, 0.5]}, "images_per_prompt": 2}
    more["sampling"] = {"num_inference_steps": 4, "batch_size": 8}
    run(tiny, tmp_path / "none.txt", tmp_path / "out", **more)
    found = rows(tmp_path / "out")
    assert [(r["prompt"], r["k"]) for r in found] == [(p, k) for p in PROMPTS[:2] for k in range(2)]
    model = ready_model(ModelSpec(path=str(tiny)))
    stock = StableDiffusionImg2ImgPipeline.from_pretrained(tiny, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    latents = model.encode_images(to_tensor(picture(1), model.resolution)[None]).detach()
    from diffalign.sampling import generators

    draw = torch.randn(model.latent_shape, generator=generators([Item(Prompt(PROMPTS[1]), 1)], 0)[0])[None]
    scheduler = model.solver(4)
    x = scheduler.add_noise(latents, draw, scheduler.timesteps[2:3])
    real = stock.prepare_latents
    stock.prepare_latents = lambda *a, **k: x
    image = stock(
        PROMPTS[1], image=picture(1), strength=0.5, num_inference_steps=4, guidance_scale=1.0, output_type="np"
    ).images[0]
    assert real is not None
    ours = np.asarray(decode(found[3]["image"]["bytes"], "x"), float) / 255
    assert np.abs(ours - image).max() <= 1.5 / 255
    (tmp_path / "in" / "1.txt").unlink()
    with pytest.raises(DataError, match="has no prompt"):
        run(tiny, tmp_path, tmp_path / "no", **more)
    with pytest.raises(ConfigError, match="0 < low <= high"):
        settings(tiny, tmp_path, tmp_path, start_from={"path": "x", "strength": [0.9, 0.1]})


def test_strength_draws_between_its_bounds_and_full_strength_is_noise_alone(tiny: Path, tmp_path: Path) -> None:
    model = ready_model(ModelSpec(path=str(tiny)))
    items = [Item(Prompt(PROMPTS[0]), 0)]
    steps = Sampler(num_inference_steps=10)
    near, far = torch.zeros(1, *model.latent_shape), torch.ones(1, *model.latent_shape)

    def moved(strength: float) -> float:
        a, b = (sample(model, items, steps, 0, start=s, strength=strength).float() for s in (near, far))
        return (a - b).abs().mean().item()

    assert moved(0.2) > moved(0.6) > moved(1.0)


def test_other_stock_schedulers_and_their_mistakes(tiny: Path, tiny_v: Path, prompts: Path, tmp_path: Path) -> None:
    run(tiny, prompts, tmp_path / "own")
    run(tiny, prompts, tmp_path / "euler", scheduler="EulerDiscreteScheduler")
    assert rows(tmp_path / "euler")[0]["sampler"] == "EulerDiscreteScheduler"
    assert rows(tmp_path / "euler")[0]["sha256"] != rows(tmp_path / "own")[0]["sha256"]
    for name, said in (("EulerDiskreteScheduler", "no scheduler"), ("FlowMatchEulerDiscreteScheduler", "flow models")):
        with pytest.raises(ConfigError, match=said):
            run(tiny, prompts, tmp_path / name, scheduler=name)


def test_the_gate_drops_or_flags(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    name = "tests.test_generate:brightness"
    run(tiny, prompts, tmp_path / "all")
    light = {r["image_id"]: brightness([decode(r["image"]["bytes"], "x")], [])[0] for r in rows(tmp_path / "all")}
    floor = sorted(light.values())[2]
    done = run(tiny, prompts, tmp_path / "drop", safety={"scorer": name, "floor": floor})
    assert done.dropped == 2
    assert {r["image_id"] for r in rows(tmp_path / "drop")} == {i for i, v in light.items() if v >= floor}
    done = run(tiny, prompts, tmp_path / "flag", safety={"scorer": name, "floor": floor, "action": "flag"})
    assert (done.flagged, done.images) == (2, 6)
    assert sorted(r["value"] for r in rows(tmp_path / "flag", "scores")) == pytest.approx(sorted(light.values()))


def test_plans_of_older_versions_go_on(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    run(tiny, prompts, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    plan = manifest["plans"]["images"]
    for key in ("gallery", "exclude", "evaluation_prompts", "preview", "start_from", "safety", "scheduler"):
        del plan[key]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert run(tiny, prompts, tmp_path / "out").made == 0
    with pytest.raises(DataError, match=r"another plan \(differs in gallery\)"):
        run(tiny, prompts, tmp_path / "out", gallery=[{"path": "x"}])


# --- kills ----------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "ACCELERATE_USE_CPU": "true"}


def launch(words: list[str], processes: int, **more: str) -> subprocess.Popen[bytes]:
    """The command, alone or under torchrun with gloo; the group of processes dies together."""
    command = [sys.executable, "-m", "diffalign", *words]
    if processes > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
        command = [sys.executable, *torchrun, "-m", "diffalign", *words]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen(command, env=environment() | more, **quiet)


def killed_at_random(words: list[str], out: Path, table: str, processes: int, kills: int, total: int) -> None:
    """SIGKILL the run ``kills`` times as shards appear, then let it finish; no shard that was there may change."""
    rng, kept = random.Random(processes), dict[str, bytes]()
    for n in range(kills):
        process = launch(words, processes)
        wanted = (n + 1) * total // (kills + 1)  # so that every run finds work
        while process.poll() is None and len(list((out / table).glob("*.parquet"))) < wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        with contextlib.suppress(ProcessLookupError):  # it was done
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = {name: data for name, data in files(out).items() if not name.endswith(".tmp")} if out.exists() else {}
        assert {name: now.get(name) for name in kept} == kept
        kept = {name: data for name, data in now.items() if name.startswith(table)}
    assert launch(words, processes).wait(timeout=120) == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_generation_is_byte_identical(tiny: Path, prompts: Path, tmp_path: Path, processes: int) -> None:
    out = tmp_path / "killed"
    config = settings(tiny, prompts, tmp_path / "whole", images_per_prompt=16, shard_size=2)
    generate_dataset(config)
    words = ["generate", f"model.path={tiny}", f"prompts={prompts}", "images_per_prompt=16", "shard_size=2"]
    words += ["sampling.num_inference_steps=2", "sampling.batch_size=2", f"output_dir={out}"]
    killed_at_random(words, out, "images", processes, 5, 24)
    assert {k: v for k, v in files(out).items() if not k.endswith(".tmp")} == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_selection_is_byte_identical(tmp_path: Path, processes: int) -> None:
    from diffalign.selection import select
    from tests.test_pairs import config, dataset

    folder = dataset(tmp_path / "d", prompts=60)
    more: dict[str, Any] = {"rule": {"type": "all"}, "bins": 3, "lists": True, "shard_size": 1}
    select(config(folder, tmp_path / "whole", **more))
    out = tmp_path / "killed"
    words = ["pairs", f"path={folder}", "reward.good=1", "rule.type=all", "bins=3", "lists=true", "shard_size=1"]
    killed_at_random([*words, f"output_dir={out}"], out, "pairs", processes, 5, 60)
    assert {k: v for k, v in files(out).items() if not k.endswith(".tmp")} == files(tmp_path / "whole")


def test_the_command_tells_what_it_left_out(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    words = [f"model.path={tiny}", f"prompts={prompts}", "sampling.num_inference_steps=1", f"output_dir={tmp_path / 'o'}"]
    (tmp_path / "bench.txt").write_text(PROMPTS[0])
    result = CliRunner().invoke(main, ["generate", *words, f"exclude=[{tmp_path / 'bench.txt'}]", "evaluation_prompts=drop"])
    assert result.exit_code == 0, result.output
    assert "2 images made now" in result.output
    assert "1 prompts left out" in result.output
