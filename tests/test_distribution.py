"""Distances between sets of features, by closed forms."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st

from diffalign.cells import ScoreConfig, score
from diffalign.cli import main
from diffalign.data.tables import read_table
from diffalign.distribution import cmmd, dissimilarity, fid, kid, precision_recall, vendi
from diffalign.errors import ConfigError, DataError, ModelError
from diffalign.scorers import inception
from diffalign.scorers.weights import digest_of
from diffalign.spread import embed
from diffalign.versus import compare, compare_lines


def cloud(seed: int, n: int = 40, d: int = 5) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.floats(-5, 5), st.floats(0.1, 4))
def test_fid_of_scaled_and_shifted_copies(shift: float, scale: float) -> None:
    """S_b = scale^2 S_a: |shift|^2 D + (1 - scale)^2 Tr S_a."""
    a = cloud(0) - cloud(0).mean(0)
    expected = 5 * shift**2 + (1 - scale) ** 2 * torch.cov(a.T).trace().item()
    assert fid(a, scale * a + shift) == pytest.approx(expected, abs=1e-8)


def test_fid_of_covariances_that_do_not_commute() -> None:
    a, b = cloud(1), cloud(2) @ cloud(3, 5)
    product = torch.cov(a.T) @ torch.cov(b.T)
    cross = torch.linalg.eigvals(product).sqrt().sum().real
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * cross
    assert fid(a, b) == pytest.approx(expected.item())
    assert fid(a, b) == pytest.approx(fid(b, a))


def test_kid_by_hand() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    expected = 3.0**3 + 1.0**3 - 2 * (1 + 8 + 1 + 27) / 4
    assert kid(a, b) == pytest.approx(expected)


def test_kid_of_one_distribution_is_zero_in_the_mean() -> None:
    values = torch.tensor([kid(cloud(2 * i), cloud(2 * i + 1)) for i in range(200)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)


def test_cmmd_by_hand() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.5]])  # unit vectors at distance sqrt 2
    assert cmmd(a, b) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)))
    assert cmmd(a, 7 * a) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_see_which_side_misses() -> None:
    real = torch.cat([cloud(0), cloud(1) + 50])
    made = real[:40] + 1e-3
    assert precision_recall(real, made) == (1, 0.5)
    assert precision_recall(made, real) == (0.5, 1)


def test_vendi_counts_what_differs() -> None:
    assert vendi(torch.eye(6)) == pytest.approx(6)
    assert vendi(torch.ones(6, 3)) == pytest.approx(1)
    assert vendi(torch.eye(3).repeat(4, 1)) == pytest.approx(3)
    x = torch.nn.functional.normalize(cloud(4), dim=-1)
    p = torch.linalg.eigvalsh(x @ x.T / 40).clamp(min=1e-300)
    assert vendi(cloud(4)) == pytest.approx(math.exp(-(p * p.log()).sum()))


def test_dissimilarity_is_the_mean_over_pairs() -> None:
    assert dissimilarity(torch.tensor([[1.0, 0], [0, 2], [-3, 0]])) == pytest.approx(1 - (0 + 0 - 1) / 3)
    assert dissimilarity(torch.ones(4, 2)) == pytest.approx(0)


# --- Inception, and features of whole folders ------------------------------------------------------------------------


def colours(images: list) -> torch.Tensor:
    return torch.tensor(np.stack([np.asarray(i, np.float32).mean((0, 1)) for i in images]))


def scored_sets(folder: Path, count: int = 6) -> list[Path]:
    """Two scored folders of ``count`` pictures, one of them there twice and one damaged."""
    for n, name in enumerate("ab"):
        (folder / name).mkdir(exist_ok=True)
        for i in range(count):
            picture(i + 50 * n).save(folder / name / f"{i}.png")
        picture(50 * n).save(folder / name / "again.png")
        (folder / name / "bad.png").write_bytes(b"")
        score(
            ScoreConfig(path=str(folder / name), output_dir=str(folder / f"{name}s"), scorers=["compressibility"], prompt="p")
        )
    return [folder / "as", folder / "bs"]


def test_any_network_looks_at_what_was_scored(tmp_path: Path) -> None:
    """Each picture once, new ones alone the second time; a Frechet distance of other features is never called FID."""
    seen: list[int] = []
    folders = scored_sets(tmp_path)
    for folder in folders:
        assert embed(folder, lambda i: seen.append(len(i)) or colours(i), "colours", batch_size=4) == 6
    assert seen == [4, 2, 4, 2]
    picture(99).save(tmp_path / "a" / "new.png")
    score(ScoreConfig(path=str(tmp_path / "a"), output_dir=str(folders[0]), scorers=["compressibility"], prompt="p"))
    assert embed(folders[0], colours, "colours") == 1
    assert len(read_table(folders[0], "embeddings")) == 7
    said = compare(*folders)
    a, b = (colours([picture(i) for i in which]) for which in ((*range(6), 99), range(50, 56)))
    assert said["distances"]["colours"]["frechet"] == pytest.approx(fid(a, b), rel=1e-5)
    text = "\n".join(compare_lines(said))
    assert "embeddings colours of 7 and 6 pictures: Frechet distance" in text
    assert "FID" not in text


def test_inceptions_features_are_called_fid(tmp_path: Path) -> None:
    folders = scored_sets(tmp_path)
    for folder in folders:
        embed(folder, colours, inception.NAME)
    assert "Inception of 6 and 6 pictures: FID " in "\n".join(compare_lines(compare(*folders)))


def test_other_weights_are_no_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / inception.FILE
    file.write_bytes(b"x")
    with pytest.raises(ModelError, match="not the published"):
        inception.Inception(file)
    with pytest.raises(DataError, match="holds no scores"):
        embed(tmp_path, colours, "colours")
    monkeypatch.setattr(inception, "DIGEST", digest_of(file, "sha256"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match="need torch-fidelity"):
        inception.Inception(file)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_fid_is_that_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own command on the same pictures, with random weights in the published layout."""
    import torch_fidelity
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    torch.manual_seed(0)
    with monkeypatch.context() as m:  # without its download
        m.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        m.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        net = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    file = tmp_path / inception.FILE
    torch.save(net.state_dict(), file)
    folders = scored_sets(tmp_path)
    monkeypatch.setattr(inception, "DIGEST", digest_of(file, "sha256"))
    done = CliRunner().invoke(main, ["compare", *map(str, folders), "--inception", str(file), "--json"])
    assert done.exit_code == 0, done.output
    for name in "ab":
        for extra in ("again.png", "bad.png"):
            (tmp_path / name / extra).unlink()
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, cuda=False, verbose=False, cache=False,
        feature_extractor_weights_path=str(file),
    )  # fmt: skip
    (said,) = compare(*folders)["distances"].values()
    assert said["frechet"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
