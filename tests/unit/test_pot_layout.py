"""Where kernel and runtime are found, what is taken when one is missing, and the lpj cache."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from pathlib import Path

import pytest
from apppot.host.common import files, paths
from apppot.host.common.errors import PotError
from apppot.host.common.files import file_digest
from apppot.host.pot import archive, layout, probe, recipes, store
from apppot.host.pot.kernel import stale_recipes


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("APPPOT_POT", str(tmp_path / "pot"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "pot").mkdir()
    return tmp_path


def put(home: Path, name: str, data: bytes = b"x") -> Path:
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o755)
    return path


def with_runtime(home: Path) -> Path:
    work = put(home / "pot", "work/runtime.ext4", b"runtime")
    store.publish(home / "pot", "runtime", [work], {"inputs": "i"})
    return home / "pot"


def with_kernel(home: Path) -> Path:
    work = put(home / "pot", "work/linux", b"kernel")
    facts: dict[str, object] = {"release": "7.2.12", "features": ["seccomp", "anon_around"]}
    store.publish(home / "pot", "kernel", [work], facts)
    return home / "pot"


def with_x86_kernel(home: Path) -> Path:
    files = [put(home / "pot", f"work/{name}", name.encode()) for name in ("vmlinux", "bzImage")]
    facts: dict[str, object] = {"release": "7.2.12", "features": ["pvh"]}
    store.publish(home / "pot", "kernel-x86_64", files, facts)
    return home / "pot"


def stock(
    home: Path, monkeypatch: pytest.MonkeyPatch, features: list[str] | None = None
) -> list[str]:
    calls: list[str] = []

    def fake(path: str) -> dict[str, object]:
        calls.append(path)
        return {"release": "6.1.1", "digest": "d" * 64, "features": features or []}

    monkeypatch.setattr(probe, "probe_kernel", fake)
    put(home, "bin/linux.uml")
    return calls


def test_the_pots_own_kernel_is_taken(homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtime(homes)
    with_kernel(homes)
    calls = stock(homes, monkeypatch)
    pot = layout.find_pot()
    assert pot.kernel.tuned
    assert pot.kernel.features == {"seccomp", "anon_around"}
    assert pot.kernel.modules is None
    assert Path(pot.kernel.path).read_bytes() == b"kernel"
    assert Path(pot.runtime).read_bytes() == b"runtime"
    assert pot.runtime_digest == file_digest(Path(pot.runtime))
    assert calls == []


def test_debians_kernel_stands_in_and_is_asked_once(
    homes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_runtime(homes)
    calls = stock(homes, monkeypatch)
    monkeypatch.setattr(layout, "STOCK_MODULES", str(homes / "modules"))
    (homes / "modules" / "6.1.1").mkdir(parents=True)
    first, second = layout.find_pot(), layout.find_pot()
    assert first == second
    assert not first.kernel.tuned
    assert first.kernel.release == "6.1.1"
    assert first.kernel.modules == str(homes / "modules" / "6.1.1")
    assert len(calls) == 1
    os.utime(homes / "bin" / "linux.uml", ns=(1, 1))
    layout.find_pot()
    assert len(calls) == 2


def test_a_given_kernel_wins(homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtime(homes)
    with_kernel(homes)
    stock(homes, monkeypatch, ["anon_around"])
    given = put(homes, "my/linux")
    pot = layout.find_pot(kernel=str(given))
    assert pot.kernel.path == str(given)
    assert pot.kernel.tuned
    with pytest.raises(PotError, match="cannot be used"):
        layout.find_pot(kernel=str(homes / "none"))


def test_what_is_missing_is_said_with_a_remedy(homes: Path) -> None:
    with pytest.raises(PotError, match="no runtime") as caught:
        layout.find_pot()
    assert "apppot pot build" in caught.value.hint
    with_runtime(homes)
    with pytest.raises(PotError, match="no kernel") as caught:
        layout.find_pot()
    assert "apppot pot build" in caught.value.hint


def test_a_lost_file_is_not_taken_for_a_pot(homes: Path) -> None:
    with_runtime(homes)
    with_kernel(homes)
    Path(layout.find_pot().kernel.path).unlink()
    with pytest.raises(PotError, match="missing or not executable"):
        layout.find_pot()
    assert store.entry(homes / "pot", "kernel") is None


def test_the_x86_kernel_is_beside_the_other(homes: Path) -> None:
    with_kernel(homes)
    with_runtime(homes)
    with pytest.raises(PotError, match="no x86-64 kernel") as caught:
        layout.find_x86_kernel()
    assert "apppot kernel build x86_64" in caught.value.hint
    with_x86_kernel(homes)
    kernel = layout.find_x86_kernel()
    assert Path(kernel.vmlinux).read_bytes() == b"vmlinux"
    assert Path(kernel.bzimage).read_bytes() == b"bzImage"
    assert kernel.digest == file_digest(Path(kernel.vmlinux))
    assert kernel.release == "7.2.12"
    assert kernel.features == {"pvh"}
    assert Path(layout.find_pot().kernel.path).read_bytes() == b"kernel"


@pytest.mark.parametrize("name", ["vmlinux", "bzimage"])
def test_half_an_x86_kernel_is_none(homes: Path, name: str) -> None:
    with_x86_kernel(homes)
    assert store.entry(homes / "pot", "kernel-x86_64") is not None
    Path(getattr(layout.find_x86_kernel(), name)).unlink()
    with pytest.raises(PotError, match="missing or unreadable"):
        layout.find_x86_kernel()
    assert store.entry(homes / "pot", "kernel-x86_64") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1}'])
def test_a_damaged_manifest_is_an_error(homes: Path, text: str) -> None:
    (homes / "pot" / layout.MANIFEST).write_text(text)
    with pytest.raises(PotError):
        layout.find_pot()


def test_publishing_one_kind_keeps_the_other_and_prunes_old_ones(homes: Path) -> None:
    with_kernel(homes)
    for number in range(5):
        work = put(homes / "pot", "work/runtime.ext4", b"%d" % number)
        store.publish(homes / "pot", "runtime", [work], {})
        os.utime(homes / "pot" / "runtime", (number, number))
    assert layout.find_pot().kernel.tuned
    left = list((homes / "pot" / "runtime").iterdir())
    assert len(left) == store.KEEP
    assert Path(layout.find_pot().runtime).read_bytes() == b"4"


def test_a_kernel_is_built_again_only_from_another_recipe(homes: Path) -> None:
    home = homes / "pot"
    uml, x86 = (recipes.load_kernel(name) for name in recipes.KERNELS)
    assert stale_recipes([uml, x86], False) == [uml, x86]
    store.publish(home, "kernel", [put(home, "work/linux")], {"recipe": uml.digest})
    assert stale_recipes([uml, x86], False) == [x86]
    files = [put(home, f"work/{name}") for name, _ in x86.files]
    store.publish(home, "kernel-x86_64", files, {"recipe": x86.digest})
    assert stale_recipes([uml, x86], False) == []
    assert stale_recipes([uml], True) == [uml]
    newer = dataclasses.replace(x86, digest="another")
    assert stale_recipes([uml, newer], False) == [newer]


def test_lpj_is_kept_per_kernel(homes: Path) -> None:
    one = layout.Kernel("/k", "7.2", "a" * 64, True, frozenset(), None)
    two = layout.Kernel("/k", "7.2", "b" * 64, True, frozenset(), None)
    assert layout.lpj_for(one) is None
    layout.remember_lpj(one.digest, 29138944)
    assert layout.lpj_for(one) == 29138944
    assert layout.lpj_for(two) is None


def test_lpj_is_per_machine(homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = layout.Kernel("/k", "7.2", "a" * 64, True, frozenset(), None)
    layout.remember_lpj(kernel.digest, 5)
    monkeypatch.setattr(layout, "_machine", lambda: "another")
    assert layout.lpj_for(kernel) is None


def test_the_console_of_a_first_boot_gives_lpj() -> None:
    line = "Calibrating delay loop... 5827.78 BogoMIPS (lpj=29138944)\n"
    assert layout.parse_lpj("x\n" + line) == 29138944
    assert layout.parse_lpj("Calibrating delay loop (skipped)") is None
    assert layout.parse_lpj("5827.78 BogoMIPS (lpj=2913") is None, "the console was cut off"


def test_a_cache_that_cannot_be_written_is_no_error(
    homes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (homes / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(homes / "file"))
    layout.remember_lpj("a", 5)


def test_state_is_versioned_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "state.json"
    files.write_json(str(path), {"x": 1})
    assert json.loads(path.read_text()) == {"version": 1, "x": 1}
    with pytest.raises(TypeError):
        files.write_json(str(path), {"x": {1, 2}})
    assert files.read_json(str(path)) == {"version": 1, "x": 1}
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


def test_a_pot_may_lie_in_one_of_several_places(
    homes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own first, then the installed package's, then the site's; each kind by itself."""
    monkeypatch.delenv("APPPOT_POT")
    monkeypatch.setenv("XDG_DATA_HOME", str(homes / "data"))
    monkeypatch.setenv("APPPOT_SITE_STORE", str(homes / "site"))
    mine, package, site = paths.pot_homes()
    assert (mine, site) == (str(homes / "data/apppot/pot"), str(homes / "site/pot"))
    assert package == str(Path(paths.__file__).resolve().parents[2] / "pot")
    assert paths.pot_home() == mine
    with pytest.raises(PotError, match=mine):
        layout.find_runtime()
    with_kernel(homes)
    with_runtime(homes)
    (homes / "pot").rename(homes / "brought")
    (homes / "site").mkdir()
    (homes / "brought").rename(site)
    found = layout.find_pot()
    assert found.runtime.startswith(site)
    assert found.kernel.path.startswith(site)
    (homes / "pot").mkdir()
    with_runtime(homes)
    Path(mine).parent.mkdir(parents=True)
    (homes / "pot").rename(mine)
    assert layout.find_runtime().startswith(mine)
    assert layout.find_kernel().path.startswith(site)


def test_a_pot_that_is_named_is_the_only_one(homes: Path) -> None:
    assert paths.pot_homes() == (str(homes / "pot"),)


@pytest.fixture
def places(homes: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The pots of user, package and site, none of which is there yet."""
    monkeypatch.delenv("APPPOT_POT")
    names = ("user", "package", "site")
    found = {name: homes / name / "pot" for name in names}
    monkeypatch.setattr(layout, "pot_homes", lambda: tuple(map(str, found.values())))
    return found


def publish(pot: Path, kind: str, **facts: object) -> None:
    store.publish(pot, kind, [put(pot, "work/file", pot.parent.name.encode())], facts)


def test_builds_and_export_take_what_the_launcher_takes(
    places: dict[str, Path], homes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uml = recipes.load_kernel("uml")
    with pytest.raises(PotError, match="no runtime") as caught:
        layout.find_runtime()
    assert all(str(place) in str(caught.value) for place in places.values())
    assert stale_recipes([uml], False) == [uml]
    publish(places["site"], "kernel", recipe=uml.digest, release="7", features=[])
    publish(places["package"], "runtime")
    assert stale_recipes([uml], False) == []
    assert store.current("kernel-x86_64") is None
    assert store.current("runtime") == (
        places["package"],
        store.entry(places["package"], "runtime"),
    )
    monkeypatch.setattr(archive, "FILES", {"kernel": ("file",), "runtime": ("file",)})
    archive.export_pot(str(homes / "pot.tar"))
    with tarfile.open(homes / "pot.tar") as tar:
        kernel, runtime = (tar.extractfile(f"{kind}/file") for kind in archive.FILES)
        assert kernel is not None and kernel.read() == b"site"
        assert runtime is not None and runtime.read() == b"package"


def test_what_a_pot_in_front_has_lost_is_not_taken_from_another(places: dict[str, Path]) -> None:
    """Else a damaged pot would run something older, and no build would mend it."""
    for name in ("user", "site"):
        publish(places[name], "runtime")
    Path(layout.find_runtime()).unlink()
    with pytest.raises(PotError, match="missing or unreadable"):
        layout.find_runtime()
    assert store.current("runtime") is None


def test_a_damaged_pot_harms_only_those_who_need_it(places: dict[str, Path]) -> None:
    publish(places["user"], "runtime")
    put(places["site"], layout.MANIFEST, b"{")
    assert Path(layout.find_runtime()).read_bytes() == b"user"
    with pytest.raises(PotError, match="damaged"):
        layout.find_x86_kernel()
    assert store.current("kernel-x86_64") is None
