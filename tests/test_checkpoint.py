# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is whole or not offered, and comes back bit for bit on any mesh."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxspeed import checkpoint
from jaxspeed.checkpoint import Checkpointer, restore_params
from jaxspeed.config import ConfigError
from jaxspeed.types import PyTree


ADAMW = optax.adamw(1e-3)
REPLICATED, SHARDED = P(), P("fsdp")
ROOT = Path(__file__).parents[1]


def abstract_state(
    mesh: Mesh,
    spec: P = SHARDED,
    *,
    width: int = 16,
    tx: optax.GradientTransformation = ADAMW,
    scaled: bool = False,
) -> PyTree:
    """Returns a small train state without its numbers, placed as a ZeRO stage would."""

    def init(key: jax.Array) -> PyTree:
        layers = {"wq": jnp.zeros((8, width, 4))}
        params = {"embed": jnp.zeros((64, width)), "layers": layers}
        params["scale"] = jnp.ones(5, jnp.bfloat16)  # divides by no mesh axis
        scale = {"scale": jnp.float32(2**15)} if scaled else ()
        parts = {"params": params, "opt": tx.init(params), "loss_scale": scale}
        return {**parts, "step": jnp.int32(0), "key": key}

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        split = x.ndim and x.shape[0] % 8 == 0
        sharding = NamedSharding(mesh, spec if split else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(init, jax.random.key(0)))


def with_numbers(like: PyTree) -> PyTree:
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(5), x.sharding)
        return jax.device_put(
            (rng.normal(size=x.shape) * 100).astype(x.dtype), x.sharding
        )

    return jax.tree.map(fill, like)


def abstract(state: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def numbers(state: PyTree) -> dict[str, np.ndarray]:
    """Returns copies of all leaves by name, random keys as their data."""
    plain = checkpoint._without_keys(state)
    leaves = jax.tree_util.tree_leaves_with_path(plain)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def assert_same(state: PyTree, want: dict[str, np.ndarray]) -> None:
    got = numbers(state)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.fixture(scope="module")
def state(mesh: Callable[..., Mesh]) -> PyTree:
    return with_numbers(abstract_state(mesh(data=2, fsdp=4)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, state: PyTree) -> Path:
    """A run that has ended, with checkpoints 10 and 20; leave it as it is."""
    run = tmp_path_factory.mktemp("run")
    with opened(run / "checkpoints") as c:
        c.save(10, state, meta={"tokens": 10_000})
        c.save(20, state, meta={"tokens": 20_000})
    return run


@pytest.fixture
def saved(tmp_path: Path, run: Path) -> Path:
    """The checkpoints of the run, to be changed."""
    return shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")


def opened(directory: Path, *, keep: int = 0) -> Checkpointer:
    return Checkpointer(directory, keep=keep, asynchronous=True)


MESHES = [
    {"fsdp": 8},
    {"data": 8},
    {"data": 4, "fsdp": 2},
    {},
    {"fsdp": 2, "tensor": 3},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("spec", [SHARDED, REPLICATED], ids=["sharded", "replicated"])
def test_state_is_bit_equal_on_another_mesh_and_stage(
    saved: Path, state: PyTree, mesh: Callable[..., Mesh], sizes: dict, spec: P
) -> None:
    like = abstract_state(mesh(**sizes), spec)
    with jax.transfer_guard("disallow"):
        restored, meta = opened(saved).restore(20, like)
    assert_same(restored, numbers(state))
    assert meta == {"tokens": 20_000}
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert (got.sharding, got.dtype) == (want.sharding, want.dtype)
    got, want = (jax.random.bits(s["key"], (4,)) for s in (restored, state))
    np.testing.assert_array_equal(got, want)


OPTIMIZERS = {
    "muon": optax.contrib.muon(1e-3),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "masked": optax.masked(optax.adam(1e-3), {"w": True, "b": False}),
    "accumulated": optax.MultiSteps(optax.lion(1e-3), 2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nested_optimizer_states_come_back(
    tmp_path: Path, mesh: Callable[..., Mesh], optimizer: str
) -> None:
    params = {"w": jnp.ones((8, 8)), "b": jnp.ones(3)}
    state = {"params": params, "opt": OPTIMIZERS[optimizer].init(params)}
    state = jax.device_put(state, NamedSharding(mesh(fsdp=2), P()))
    with opened(tmp_path) as c:
        c.save(1, state, meta={})
        restored, _ = c.restore(1, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same(restored, numbers(state))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys_come_back_with_their_generator(
    tmp_path: Path, mesh: Callable[..., Mesh], impl: str
) -> None:
    whole = NamedSharding(mesh(fsdp=8), P())
    keys = jax.device_put(jax.random.split(jax.random.key(3, impl=impl), 4), whole)
    state = {"params": {"w": jax.device_put(jnp.ones(4), whole)}, "key": keys}
    with opened(tmp_path) as c:
        c.save(1, state, meta={})
        restored, _ = c.restore(1, abstract(state))
    assert restored["key"].dtype == keys.dtype
    assert_same(restored, numbers(state))


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 8}, {}], ids=str)
def test_state_may_be_donated_as_soon_as_save_returns(
    tmp_path: Path, mesh: Callable[..., Mesh], asynchronous: bool, sizes: dict
) -> None:
    """On CPU a host copy can be a view of the very buffer that the next step takes."""
    sharding = NamedSharding(mesh(**sizes), SHARDED if "data" not in sizes else P())
    make = jax.jit(
        lambda x: {f"w{i}": jnp.full((512, 1024), x + i) for i in range(8)},
        out_shardings=sharding,
    )
    step = jax.jit(
        lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree),
        donate_argnums=0,
        out_shardings=sharding,
    )
    like = {"params": abstract(jax.block_until_ready(step(make(0.0))))}  # compiles
    with Checkpointer(tmp_path, keep=0, asynchronous=asynchronous) as c:
        for n in range(3):
            params = jax.block_until_ready(make(float(n)))
            c.save(n, {"params": params}, meta={})
            for _ in range(3):
                params = step(params)
            jax.block_until_ready(params)
        for n in range(3):
            restored, _ = c.restore(n, like)
            for i, (_, array) in enumerate(sorted(restored["params"].items())):
                np.testing.assert_array_equal(np.asarray(array), n + i)


KILLED = """
import os, signal, sys
import jax
import jax.numpy as jnp
from jaxspeed import checkpoint

point, directory = sys.argv[1:]
mesh = jax.make_mesh((1,), ("fsdp",))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
state = {"params": {"w": jax.device_put(jnp.arange(1 << 22), whole)}}


def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)


c = checkpoint.Checkpointer(directory, keep=1, asynchronous=True)
c.latest()
assert not [name for name in sys.modules if name.startswith("orbax")], "imported early"
c.save(10, state, meta={})
c.wait()
if point == "before the manifest":
    checkpoint._MetaHandler.finalize = kill
if point == "before the rename":
    finalize = checkpoint._MetaHandler.finalize
    checkpoint._MetaHandler.finalize = lambda *args: kill(finalize(*args))
c.save(20, state, meta={})
if point == "after save":
    kill()
c.wait()
"""


@pytest.mark.slow
def test_half_written_checkpoint_is_never_offered(
    tmp_path: Path, mesh: Callable[..., Mesh], caplog: pytest.LogCaptureFixture
) -> None:
    points = ["after save", "before the manifest", "before the rename"]
    children = [
        subprocess.Popen([sys.executable, "-c", KILLED, p, str(tmp_path / p)], cwd=ROOT)
        for p in points
    ]
    assert [child.wait(timeout=100) for child in children] == [-9] * len(points)
    like = jax.ShapeDtypeStruct(
        (1 << 22,), jnp.int32, sharding=NamedSharding(mesh(fsdp=8), SHARDED)
    )
    for point in points:
        directory = tmp_path / point
        assert list(directory.glob("20.*")), f"{point}: there is no half checkpoint"
        with opened(directory) as c:
            assert c.candidates() == [(20, "unfinished"), (10, "")]
            with pytest.raises(ConfigError, match=r"step 20 .* 20 \(unfinished\), 10"):
                c.restore(20, {"params": {"w": like}})
            caplog.clear()
            restored, _ = c.restore(None, {"params": {"w": like}})
            assert "20 skipped: it is unfinished" in caplog.text
            np.testing.assert_array_equal(restored["params"]["w"], np.arange(1 << 22))
            c.save(30, restored, meta={})
        assert [path.name for path in sorted(directory.iterdir())] == ["10", "30"]
        assert c.latest() == 30


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def biggest(step: Path) -> Path:
    return max(step.glob("*/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)


DAMAGE: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any], str]] = {
    "array file cut": (biggest, truncate, "bytes of"),
    "array file empty": (biggest, lambda p: p.write_bytes(b""), "has 0 bytes of"),
    "array file gone": (biggest, Path.unlink, "is missing"),
    "array file flipped": (biggest, flip, "checksum"),
    "index gone": (lambda s: s / "state/manifest.ocdbt", Path.unlink, "is missing"),
    "item gone": (lambda s: s / "params", shutil.rmtree, "is missing"),
    "meta flipped": (lambda s: s / "meta/meta.json", flip, "checksum"),
    "manifest cut": (lambda s: s / "meta/manifest.json", truncate, "cannot be read"),
    "manifest empty": (
        lambda s: s / "meta/manifest.json",
        lambda p: p.write_text("{}"),
        "no list of files",
    ),
    "manifest gone": (lambda s: s / "meta/manifest.json", Path.unlink, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_and_the_older_one_taken(
    saved: Path, state: PyTree, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    choose, harm, words = DAMAGE[damage]
    path = choose(saved / "20")
    name = path.relative_to(saved / "20").as_posix()
    harm(path)
    with opened(saved) as c:
        with pytest.raises(ConfigError) as error:
            c.restore(20, abstract(state))
        message = str(error.value)
        assert all(text in message for text in (name, words, "step 10"))
        assert "\n" not in message
        assert c.latest() == 10
        assert f"{saved}/20 skipped: " in caplog.text
        assert name in caplog.text
        restored, meta = c.restore(None, abstract(state))
        assert_same(restored, numbers(state))
        assert meta == {"tokens": 10_000}


def test_every_file_is_in_the_manifest(saved: Path) -> None:
    files = {p for p in (saved / "20").rglob("*") if p.is_file()}
    names = {p.relative_to(saved / "20").as_posix() for p in files}
    late = {n for n in names if Path(n).name in checkpoint._UNLISTED}
    manifest = json.loads((saved / "20/meta/manifest.json").read_text())
    assert names - late == {*manifest, "meta/manifest.json"}
    assert not [n for n in names if "sums." in n]


def test_missing_checkpoint_lists_the_candidates(saved: Path, state: PyTree) -> None:
    biggest(saved / "10").unlink()
    with pytest.raises(
        ConfigError, match=r"no checkpoint of step 15 .* 20, 10 \(.*mis"
    ):
        opened(saved).restore(15, abstract(state))
    with pytest.raises(ConfigError, match=r"no whole checkpoint in .*there: none"):
        opened(saved / "elsewhere").restore(None, abstract(state))
    assert opened(saved / "elsewhere").latest() is None


OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "wider": ({"width": 32}, ["another model", "64,16", "64,32", "params/embed"]),
    "optimizer": (
        {"tx": optax.sgd(0.1, momentum=0.9)},
        ["another optimizer", "opt/0/trace/embed", "opt/0/mu/embed", "--init"],
    ),
    "moment dtype": (
        {"tx": optax.adamw(1e-3, mu_dtype=jnp.bfloat16)},
        ["another optimizer", "float32[64,16] there", "bfloat16[64,16] here"],
    ),
    "loss scale": ({"scaled": True}, ["dtype.compute", "loss_scale/scale", "--init"]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_checkpoint_of_another_run_is_refused_before_reading(
    saved: Path, mesh: Callable[..., Mesh], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = OTHERS[other]
    monkeypatch.setattr(checkpoint, "_read_arrays", lambda *_: pytest.fail("was read"))
    with pytest.raises(ConfigError) as error:
        opened(saved).restore(20, abstract_state(mesh(fsdp=8), **change))
    message = str(error.value)
    assert all(word in message for word in (*words, str(saved / "20")))
    assert "\n" not in message


def test_missing_and_unexpected_leaves_are_named(saved: Path, state: PyTree) -> None:
    like = abstract(state)
    like["params"]["bias"] = like["params"].pop("scale")
    with pytest.raises(
        ConfigError, match="not there: params/bias; only there: params/s"
    ):
        opened(saved).restore(20, like)


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [4, 3]), (0, [4, 3, 2, 1])])
def test_newest_checkpoints_are_kept(
    tmp_path: Path, state: PyTree, keep: int, left: list[int]
) -> None:
    for steps in ((1, 2), (3, 4)):  # a second run goes on counting
        with opened(tmp_path, keep=keep) as c:
            for step in steps:
                assert c.save(step, state, meta={})
    assert [c.step for c in opened(tmp_path).candidates()] == left


def test_saving_the_same_step_again_writes_nothing(saved: Path, state: PyTree) -> None:
    with opened(saved) as c:
        restored, _ = c.restore(20, abstract(state))
        before = (saved / "20/meta/manifest.json").stat().st_mtime_ns
        assert not c.save(20, restored, meta={})
        assert c.save(30, restored, meta={})
        assert not c.save(30, restored, meta={})
    assert (saved / "20/meta/manifest.json").stat().st_mtime_ns == before


def test_checkpoints_of_a_course_that_was_left_are_set_aside(
    saved: Path, state: PyTree, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(saved, keep=2) as c:
        restored, _ = c.restore(10, abstract(state))
        c.save(15, restored, meta={"course": 2})
        c.save(20, restored, meta={"course": 2})
        assert c.restore(None, abstract(state))[1] == {"course": 2}
        assert [c.step for c in c.candidates()] == [20, 15]
    (kept,) = saved.glob("20.superseded-*")
    assert kept.name in caplog.text
    assert_same(
        {"params": restore_params(kept, abstract(state["params"]))},
        numbers({"params": state["params"]}),
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("may not mount a tmpfs here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def assert_full_disk_is_survived(
    directory: Path, state: PyTree, fill: Callable[[], Any], empty: Callable[[], Any]
) -> None:
    want = numbers(state)

    def write() -> None:
        c.save(2, state, meta={})
        c.wait()

    with opened(directory, keep=1) as c:
        c.save(1, state, meta={})
        c.wait()
        fill()
        words = r"step 2 .*No space left.*whole there: 1;"
        with pytest.raises(ConfigError, match=words):
            write()
        assert [path.name for path in directory.iterdir()] == ["1"]
        empty()
        assert_same(c.restore(None, abstract(state))[0], want)
        assert c.save(2, state, meta={})
    assert opened(directory).latest() == 2


def test_full_disk_is_one_line_and_costs_no_older_checkpoint(
    small_disk: Path,
    state: PyTree,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ballast = small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            file.write(b"\0" * (os.statvfs(small_disk).f_bavail * 4096 - 20_000))

    assert_full_disk_is_survived(small_disk / "run", state, fill, ballast.unlink)
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.levelno > logging.DEBUG]


def test_failure_in_the_background_is_raised_at_the_next_call(
    tmp_path: Path, state: PyTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    def fill() -> None:
        monkeypatch.setattr(checkpoint._MetaHandler, "finalize", full)

    assert_full_disk_is_survived(tmp_path, state, fill, monkeypatch.undo)


def test_error_that_is_not_the_disks_is_not_blamed_on_it(
    tmp_path: Path, state: PyTree
) -> None:
    scale = state["params"]["scale"]
    with opened(tmp_path) as c:
        with pytest.raises(ValueError, match="zero size.*name=w,"):
            c.save(1, {"params": {"w": scale[:0]}}, meta={})
        assert c.save(1, state, meta={})


def test_unwritable_directory_is_one_line_at_once(
    tmp_path: Path, state: PyTree
) -> None:
    (tmp_path / "file").touch()
    c = opened(tmp_path / "file" / "checkpoints")
    for call in (c.prepare, lambda: c.save(1, state, meta={})):
        with pytest.raises(ConfigError, match="Not a directory; .*--workdir"):
            call()
    with pytest.raises(ConfigError, match="mount the bucket"):
        opened(cast(Any, "gs://bucket/run"))


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/20"])
def test_parameters_alone_come_from_a_run_a_folder_or_a_step(
    saved: Path, state: PyTree, mesh: Callable[..., Mesh], below: str
) -> None:
    shutil.rmtree(saved / "20" / "state")  # not read
    if below != "checkpoints/20":  # not whole either, so the run offers the one before
        with pytest.raises(ConfigError, match="no checkpoint of step 15"):
            restore_params(saved / "15", abstract(state["params"]))
    like = abstract_state(mesh(fsdp=2), REPLICATED)["params"]
    params = restore_params(saved.parent / below, like)
    assert_same({"params": params}, numbers({"params": state["params"]}))


def test_parameters_come_in_the_dtype_asked_for(saved: Path, state: PyTree) -> None:
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        state["params"],
    )
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state["params"])
    assert_same(restore_params(saved, like), numbers(want))


def test_parameters_of_another_model_are_refused(
    saved: Path, mesh: Callable[..., Mesh]
) -> None:
    like = abstract_state(mesh(fsdp=8), width=8)["params"]
    with pytest.raises(ConfigError, match=r"params/embed is \[64,16\] there"):
        restore_params(saved, like)
    with pytest.raises(ConfigError, match="no whole checkpoint in"):
        restore_params(saved / "nowhere", like)


class ByteIterator:
    """Says its position in bytes, as the iterator of Grain's DataLoader does."""

    def __init__(self) -> None:
        self.at = 0

    def __next__(self) -> int:
        self.at += 1
        return self.at

    def get_state(self) -> bytes:
        return json.dumps({"at": self.at}).encode()

    def set_state(self, state: bytes) -> None:
        self.at = json.loads(state)["at"]


def grain_iterator() -> Any:
    data = grain.MapDataset.range(1000).shuffle(seed=7).batch(4)
    return iter(data.to_iter_dataset())


@pytest.mark.parametrize("make", [grain_iterator, ByteIterator])
def test_iterator_goes_on_with_the_next_batch(
    tmp_path: Path, state: PyTree, make: Callable[[], Any]
) -> None:
    iterator = make()
    for _ in range(5):
        next(iterator)
    with opened(tmp_path) as c:
        c.save(5, state, iterator=iterator, meta={})
        want = [next(iterator) for _ in range(3)]
        again = make()
        c.restore(5, abstract(state), iterator=again)
    np.testing.assert_array_equal([next(again) for _ in range(3)], want)


def test_position_that_does_not_fit_is_refused(saved: Path, state: PyTree) -> None:
    with pytest.raises(ConfigError, match="saved without a data position"):
        opened(saved).restore(20, abstract(state), iterator=ByteIterator())


def test_facts_that_are_not_json_are_refused(tmp_path: Path, state: PyTree) -> None:
    with pytest.raises(TypeError, match="meta does not fit into JSON"):
        opened(tmp_path).save(1, state, meta={"array": np.ones(2)})
    with pytest.raises(TypeError, match="params/w is a float"):
        opened(tmp_path).save(1, {"params": {"w": 1.0}}, meta={})


def test_users_do_not_see_the_log_of_orbax(
    tmp_path: Path,
    state: PyTree,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with opened(tmp_path, keep=1) as c:
        for step in (1, 2):
            c.save(step, state, meta={})
        c.restore(None, abstract(state))
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.levelno > logging.DEBUG]


def test_plain_orbax_opens_the_checkpoint(saved: Path, state: PyTree) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(saved / "20/params", abstract(state["params"]))
    assert_same(params, numbers(state["params"]))


WORKER = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 2)
process, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, process)

from jaxspeed.checkpoint import Checkpointer, restore_params
from jaxspeed.config import ConfigError


class Position:
    state = {"at": 0}

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def make(sharding):
    w = jnp.arange(4096.0).reshape(8, 512)
    state = {"params": {"w": w, "b": w[0]}, "step": jnp.int32(3), "key": jax.random.key(5)}
    whole = NamedSharding(sharding.mesh, P())
    places = {"params": {"w": sharding, "b": whole}, "step": whole, "key": whole}
    return jax.jit(lambda: state, out_shardings=places)()


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def same(a, b):
    equal = jax.jit(lambda a, b: jnp.all(jnp.array([(x == y).all() for x, y in zip(a, b)])))
    return bool(equal(jax.tree.leaves(a), jax.tree.leaves(b)))


mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
state = make(NamedSharding(mesh, P("fsdp")))
position = Position()
position.state = {"at": 100 + process}
with Checkpointer(directory, keep=2, asynchronous=True) as c:
    for step in (1, 2, 3):
        c.save(step, state, iterator=position, meta={"n": step})
    c.wait()
    like = abstract(make(NamedSharding(mesh, P(None, ("data", "fsdp")))))
    fresh = Position()
    restored, meta = c.restore(None, like, iterator=fresh)
    assert meta == {"n": 3} and fresh.state == {"at": 100 + process}
    assert same(restored, state)
    assert same(restore_params(directory, like["params"]), state["params"])
    for n in (0, 1):  # a file of which only one process reads the checksum
        files = (directory / "3/params").glob(f"ocdbt.process_{n}/d/*")
        path = max(files, key=lambda p: p.stat().st_size)
        data = path.read_bytes()
        jax.experimental.multihost_utils.sync_global_devices("read")
        if process == 0:
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        jax.experimental.multihost_utils.sync_global_devices("harmed")
        try:
            c.restore(3, like)
            raise AssertionError("damage was not seen")
        except ConfigError as error:
            assert path.name in str(error) and "step 2" in str(error), error
        assert c.latest() == 2
        jax.experimental.multihost_utils.sync_global_devices("seen")
        if process == 0:
            path.write_bytes(data)
    c.restore(2, like)
    c.save(3, state, iterator=position, meta={"n": 33})  # sets the other 3 aside
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_write_one_checkpoint(
    tmp_path: Path, mesh: Callable[..., Mesh]
) -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(n), port, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in (0, 1)
    ]
    for child in children:
        out, err = child.communicate(timeout=100)
        assert child.returncode == 0, err
        assert out.endswith("done\n")
    assert [c.step for c in opened(tmp_path).candidates()] == [3, 2]
    sharding = NamedSharding(mesh(fsdp=8), SHARDED)
    like = {"w": jax.ShapeDtypeStruct((8, 512), jnp.float32, sharding=sharding)}
    like["b"] = jax.ShapeDtypeStruct((512,), jnp.float32, sharding=sharding)
    params = restore_params(tmp_path, like)
    np.testing.assert_array_equal(params["w"], np.arange(4096.0).reshape(8, 512))
    whole = NamedSharding(mesh(fsdp=8), P())
    rest = {"step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)}
    key = jax.eval_shape(lambda: jax.random.key(5))
    rest["key"] = jax.ShapeDtypeStruct((), key.dtype, sharding=whole)
    with pytest.raises(ConfigError, match="position of 2 processes and there are 1"):
        opened(tmp_path).restore(3, {"params": like, **rest}, iterator=ByteIterator())
    assert opened(tmp_path).restore(3, {"params": like, **rest})[1] == {"n": 33}
