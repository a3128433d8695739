"""RichHF-18K: TFRecord files as they are published, with their pictures in Pick-a-Pic, and all that may be wrong."""

from __future__ import annotations

import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.data.images import decode, sha256
from diffalign.data.scores import read_scored
from diffalign.data.tables import read_table
from diffalign.data.tfrecords import crc32c, example, masked, records, tfrecord_rows
from diffalign.errors import ConfigError, DataError
from diffalign.spec import validate
from tests.test_import import PICKAPIC, jpeg, pairs, pick, run


def crc_bit_by_bit(data: bytes) -> int:
    """CRC-32C by its definition: division by x^32 + ... = 0x1EDC6F41, bits of each byte from the low end."""
    crc = 0xFFFFFFFF
    for byte in data:
        for i in range(8):
            top = crc >> 31 ^ (byte >> i & 1)
            crc = (crc << 1 & 0xFFFFFFFF) ^ (0x1EDC6F41 if top else 0)
    return int(f"{crc:032b}"[::-1], 2) ^ 0xFFFFFFFF


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, and every catalogue of checksums
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(bytes(range(32))) == 0x46DD794E
    rng = random.Random(0)
    for n in (0, 1, 7, 40):
        data = rng.randbytes(n)
        assert crc32c(data) == crc_bit_by_bit(data)


def proto() -> Any:
    """tf.train.Example, made of its description by Google's own protobuf."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(parent: Any, name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        made = parent.add(name=name)
        for label, number, kind, repeated, of in fields:
            made.field.add(name=label, number=number, type=kind, label=repeated, **{"type_name": of} if of else {})
        return made

    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    message(file.message_type, "BytesList", ("value", 1, kinds.TYPE_BYTES, many, ""))
    message(file.message_type, "FloatList", ("value", 1, kinds.TYPE_FLOAT, many, ""))
    message(file.message_type, "Int64List", ("value", 1, kinds.TYPE_INT64, many, ""))
    lists = [
        (f"{k}_list", n, kinds.TYPE_MESSAGE, one, f".tensorflow.{k.title()}List")
        for n, k in enumerate(("bytes", "float", "int64"), 1)
    ]
    feature = message(file.message_type, "Feature", *lists)
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message(
        file.message_type, "Features", ("feature", 1, kinds.TYPE_MESSAGE, many, ".tensorflow.Features.FeatureEntry")
    )
    entry = message(
        features.nested_type, "FeatureEntry", ("key", 1, kinds.TYPE_STRING, one, ""),
        ("value", 2, kinds.TYPE_MESSAGE, one, ".tensorflow.Feature"),
    )  # fmt: skip
    entry.options.map_entry = True
    message(file.message_type, "Example", ("features", 1, kinds.TYPE_MESSAGE, one, ".tensorflow.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def message_of(**features: Any) -> bytes:
    made = proto()()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])] if values else "float_list"
        getattr(made.features.feature[name], kind).value.extend(values)
    return made.SerializeToString()


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def test_messages_read_as_protobuf_writes_them() -> None:
    said = {
        "name": "train/ä.png".encode(),
        "score": 0.25,
        "many": [1.5, -2.0, 3.0],
        "whole": [-1, 0, 2**40, -(2**63)],
        "b": [b"", b"x"],
    }
    assert example(message_of(**said)) == {k: v if isinstance(v, list) else [v] for k, v in said.items()}
    unpacked = b"\x0d" + struct.pack("<f", 0.5) + b"\x0d" + struct.pack("<f", 0.75)
    feature = b"\x12" + bytes([len(unpacked)]) + unpacked
    entry = b"\x0a\x01s\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    assert example(b"\x0a" + bytes([len(features)]) + features) == {"s": [0.5, 0.75]}
    whole = message_of(**said)
    for cut in range(1, len(whole)):
        try:
            example(whole[:cut])
        except ValueError:
            continue
    for wrong in (b"\xff", b"\x0f", b"\x0a\x05x", b"\xff" * 12):
        with pytest.raises(ValueError, match=r"cut short|wire type"):
            example(wrong)


def test_files_read_as_tensorboard_writes_them(tmp_path: Path) -> None:
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    rng = random.Random(1)
    said = [rng.randbytes(n) for n in (0, 1, 300, 70_000)]
    with (tmp_path / "x.tfrecord").open("wb") as f:
        made = writer.RecordWriter(f)
        for data in said:
            made.write(data)
        made.flush()
    assert list(records(tmp_path / "x.tfrecord")) == said
    assert (tmp_path / "x.tfrecord").read_bytes() == b"".join(map(record, said))


def test_damaged_records_are_told_and_the_next_ones_found(tmp_path: Path) -> None:
    file, said = tmp_path / "x.tfrecord", [bytes([n]) * 50 for n in range(5)]
    whole = b"".join(map(record, said))
    size = len(record(said[0]))

    def with_flip(at: int) -> list[bytes | None]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        return list(records(file))

    rest = [None, *said[2:]]
    for at in (size + 20, 2 * size - 1, size, size + 9):  # the data, their checksum, the length, its checksum
        assert with_flip(at) == [said[0], *rest]
    assert with_flip(0) == [None, *said[1:]]
    for cut in (1, 30, size - 5):
        file.write_bytes(whole[: 4 * size + cut])
        assert list(records(file)) == [*said[:4], None]
    file.write_bytes(b"")
    assert list(records(file)) == []
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:6d\nsize 9\n")
    with pytest.raises(DataError, match="a Git LFS pointer"):
        list(records(file))
    file.write_bytes(b"no records here, only some text that is long enough")
    with pytest.raises(DataError, match="not a TFRecord file"):
        list(records(file))
    file.write_bytes(record(b"\xff\xff") + record(message_of(a=1.0, none=[])))
    assert list(tfrecord_rows(file)) == [{"error": "a damaged record"}, {"a": 1.0, "none": None}]


# --- the data set -------------------------------------------------------------------------------------------------------


def heat(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64), level, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def rich(name: str, overall: float, labels: str, others: tuple[float, float, float] | None = None, **more: Any) -> bytes:
    aesthetics, artifact, misalignment = others or (overall,) * 3
    said = {
        "filename": f"train/{name}.png".encode(), "aesthetics_score": aesthetics, "artifact_score": artifact,
        "misalignment_score": misalignment, "overall_score": overall, "artifact_map": heat(9), "misalignment_map": heat(200),
        "prompt_misalignment_label": labels.encode(),
    }  # fmt: skip
    return record(message_of(**{k: v for k, v in (said | more).items() if v is not None}))


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path]:
    """train.tfrecord with its known defects, and Pick-a-Pic's files. Three pictures are of the caption "a cat, asleep"."""
    cat = {"caption": "a cat, asleep"}
    rows = [
        pick(0, 1.0, **cat), pick(1, 0.0, image_1_uid="b0", **cat), pick(2, 1.0), pick(3, 0.5),
        pick(4, 1.0, jpg_0=jpeg(9)[:200]), pick(5, 1.0, jpg_1=None),
    ]  # fmt: skip
    (tmp_path / "pick").mkdir()
    table = pa.Table.from_pylist(rows, schema=PICKAPIC)
    pq.write_table(table, tmp_path / "pick" / "train-00000-of-00001.parquet", row_group_size=2)
    (tmp_path / "rich").mkdir()
    broken = bytearray(rich("a2", 0.9, "1 1"))
    broken[60] ^= 4
    parts = [
        rich("a0", 0.75, "1 1 0"), rich("b3", 0.5, "1 0"), bytes(broken), rich("a1", 0.25, "1 1 1", (0.5, 0.1, 0.2)),
        rich("b0", 0.25, "0 1 0", artifact_map=None), rich("nowhere", 0.5, "1 1"), rich("a3", 0.75, "1"),
        rich("a2", 0.5, "1 1", overall_score=None), rich("b2", float("nan"), "1 1"), rich("a4", 0.5, "1 1"),
        rich("b5", 0.5, "1 1"), rich("x", 0.5, "1 1", filename=None), rich("b1", 0.5, "1 1 1")[:-30],
    ]  # fmt: skip
    (tmp_path / "rich" / "train.tfrecord").write_bytes(b"".join(parts))
    return tmp_path / "rich", tmp_path / "pick"


def test_scores_pairs_heatmaps_and_words(published: tuple[Path, Path], tmp_path: Path) -> None:
    source, pictures = published
    out = tmp_path / "out"
    done = run(source, "richhf", out, pictures_from=str(pictures))
    cat = "a cat, asleep"
    assert sorted(pairs(out)) == [
        (cat, "a0", "a1", 1.0),
        (cat, "a0", "b0", 1.0),
        (cat, "b0", "a1", 0.5),
        ("caption 3", "a3", "b3", 1.0),
    ]
    assert done.dropped == {
        "a damaged record": 2, "no prompt: Pick-a-Pic has no such picture": 1, "no label": 2, "a picture is damaged": 1,
        "a picture is missing": 1, "no file name": 1, "labels of words that are not those of the prompt": 1,
    }  # fmt: skip
    assert (done.rows, done.pairs, done.ties, done.rated) == (13, 4, 1, 5)
    assert (done.agrees, done.disagrees) == (3, 0)
    found = {r.image_id: r for r in read_scored(out)}
    assert set(found) == {"a0", "a1", "b0", "a3", "b3"}
    assert found["a1"].values == pytest.approx(
        {"richhf/overall": 0.25, "richhf/aesthetics": 0.5, "richhf/artifact": 0.1, "richhf/misalignment": 0.2}
    )
    assert found["a0"].sha256 == sha256(jpeg(0))
    margins = {
        r["rejected_id"]: json.loads(r["margins"]) for r in read_table(out, "pairs").to_pylist() if r["chosen_id"] == "a0"
    }
    assert margins["a1"] == pytest.approx({"overall": 0.5, "aesthetics": 0.25, "artifact": 0.65, "misalignment": 0.55})
    marks = {(r["image_sha256"], r["kind"]): r for r in read_table(out, "annotations").to_pylist()}
    assert marks[sha256(jpeg(0)), "richhf/misalignment"]["words"] == ["asleep"]
    assert marks[found["b0"].sha256, "richhf/misalignment"]["words"] == ["a", "asleep"]
    assert (found["b0"].sha256, "richhf/artifact") not in marks
    assert marks[found["a3"].sha256, "richhf/misalignment"]["words"] is None
    assert np.asarray(decode(marks[sha256(jpeg(0)), "richhf/artifact"]["image"]["bytes"], "it")).mean() == pytest.approx(
        9, abs=1
    )


def test_a_dataset_folder_serves_as_well_and_shards_change_nothing(published: tuple[Path, Path], tmp_path: Path) -> None:
    from diffalign.curation import merge_datasets
    from diffalign.inspection import validate_dataset

    source, pictures = published
    run(pictures, "pickapic", tmp_path / "own")
    done = run(source, "richhf", tmp_path / "a", pictures_from=str(tmp_path / "own"), shard_size=1)
    assert len(list((tmp_path / "a" / "pairs").iterdir())) > 2
    run(source, "richhf", tmp_path / "b", pictures_from=str(pictures))
    assert sorted(pairs(tmp_path / "a")) == sorted(pairs(tmp_path / "b"))
    assert {r.image_id: r.values for r in read_scored(tmp_path / "a")} == {
        r.image_id: r.values for r in read_scored(tmp_path / "b")
    }
    assert done.rated == 5
    assert not [f for f in validate_dataset(tmp_path / "b", pictures=True) if f.wrong]
    counts = merge_datasets([tmp_path / "b"], tmp_path / "merged")
    assert counts["annotations"] == len(read_table(tmp_path / "b", "annotations"))
    ids_only = run(source, "richhf", tmp_path / "c", pictures_from=str(pictures), pictures=False)
    assert (ids_only.pairs, len(read_table(tmp_path / "c", "images"))) == (4, 7)


def test_parquet_copies_bring_their_pictures_and_names_alone_are_refused(published: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [
        {"filename": f"train/{n}.png", "prompt": "a cat", "image": {"bytes": jpeg(i), "path": None},
         "overall_score": 0.5 + i / 4, "prompt_misalignment_label": "1 0"} for i, n in enumerate("ab")
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "copy.parquet")
    done = run(tmp_path / "copy.parquet", "richhf", tmp_path / "out")
    assert pairs(tmp_path / "out") == [("a cat", "b", "a", 1.0)]
    assert done.rated == 2
    assert {tuple(r["words"]) for r in read_table(tmp_path / "out", "annotations").to_pylist()} == {("cat",)}
    with pytest.raises(ConfigError, match=r"pictures_from: train\.tfrecord holds no prompts"):
        run(published[0], "richhf", tmp_path / "none")


def test_the_scores_make_pairs_by_any_rule(published: tuple[Path, Path], tmp_path: Path) -> None:
    from diffalign.selection import SelectConfig, select

    run(published[0], "richhf", tmp_path / "in", pictures_from=str(published[1]))
    said = {"path": str(tmp_path / "in"), "reward": {"richhf/artifact": 1}, "output_dir": str(tmp_path / "out")}
    select(validate(SelectConfig, said))
    assert ("a cat, asleep", "a0", "a1", 1.0) in pairs(tmp_path / "out")


def test_single_pictures_are_labels_by_their_score(published: tuple[Path, Path], tmp_path: Path, overrides: list[str]) -> None:
    from diffalign.data.examples import read_rated
    from diffalign.recipes import TrainConfig, train
    from diffalign.spec import with_overrides

    out = str(tmp_path / "in")
    run(published[0], "richhf", Path(out), pictures_from=str(published[1]))
    found = {x.pictures[0].key: x.good for x in read_rated(out, "richhf/overall", 0.5)}
    good = {"a0": True, "a1": False, "b0": False, "a3": True, "b3": True}
    assert found == {r.sha256: good[r.image_id] for r in read_scored(Path(out))}
    more = [*overrides, f"data.path={out}", "data.holdout=0", "evaluate.enabled=false"]
    config = {"objective": {"type": "kto"}, "model": {"lora": {"rank": 2}}}
    labels = "data.labels={score: richhf/overall, at: 0.5}"
    assert train(validate(TrainConfig, with_overrides(config, [*more, labels]))).metrics["steps"] == 2
    with pytest.raises(DataError, match="no image has the score 'clip'"):
        read_rated(out, "clip", 0.5)
    with pytest.raises(ConfigError, match=r"data\.labels is about labels, but sigmoid is about pairs"):
        validate(TrainConfig, with_overrides({"objective": {"type": "sigmoid"}}, [*more, labels]))


def test_prompts_that_are_evaluated_on_bring_no_pictures_either(published: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "bench.txt").write_text("A CAT asleep!\n")
    barred = {"pictures_from": str(published[1]), "exclude": [str(tmp_path / "bench.txt")]}
    with pytest.raises(DataError, match="prompts are evaluated on"):
        run(published[0], "richhf", tmp_path / "refused", **barred)
    done = run(published[0], "richhf", tmp_path / "out", **barred, evaluation_prompts="drop")
    assert {r.image_id for r in read_scored(tmp_path / "out")} == {"a3", "b3"}
    assert done.dropped["a prompt that is evaluated on"] == 6  # three pictures, three pairs
