"""The commonest mistakes, and the sentence that each ends in: what is wrong, and what to type instead."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import small_runs
import small_world
import torch

from bevfn import cli, detector
from bevfn.commands import meant
from bevfn.commands import train as command
from bevfn.data import source
from bevfn.experiments import awml, bevdepth, bevfusion_lidar, custom
from bevfn.training import assembly, checkpoint, command_line, run, tasks

MODEL = "bevfusion-lidar"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with runs/good, a published file, a file of something else and a file that is none."""
    made = tmp_path_factory.mktemp("place")
    step = small_runs.write(made / "runs" / "good", MODEL)
    checkpoint.keep_best(step.parent, step.name, 0.5)
    published = {"pts_voxel_encoder.a": torch.zeros(2), "pts_bbox_head.shared_conv.weight": torch.zeros(2)}
    torch.save({"state_dict": published}, made / "published.pth")
    torch.save({"state_dict": {"layer1.0.conv1.weight": torch.zeros(2)}}, made / "resnet.pth")
    safetensors.torch.save_file({"a": torch.zeros(2)}, made / "other.safetensors")
    (made / "damaged.pth").write_bytes(b"PK\x03\x04 and no more")
    return made


TRAIN = "train bevfusion_lidar --data-root WORLD --run-dir runs/new "
EVAL = "eval bevfusion_lidar --data-root WORLD --checkpoint "
MISTAKES = [
    # a file that has to be imported first
    (EVAL + "published.pth", "published.pth is a published file (a detector of the CenterPoint or BEVDet family), which is imported first: `bevfn checkpoint import published.pth published_imported.safetensors --model MODEL`"),
    (TRAIN + "--pretrained resnet.pth", "resnet.pth is a published file (a ResNet or a detector on one), which is imported first: `bevfn checkpoint import resnet.pth "),
    (EVAL + "other.safetensors", "other.safetensors is a published file"),
    (EVAL + "damaged.pth", "damaged.pth is not a complete torch checkpoint"),
    (EVAL + "runs/good/checkpoints/step_00000001/train_state.safetensors", "is a part of a checkpoint; give its folder, runs/good/checkpoints/step_00000001"),
    # a checkpoint that is not there
    (EVAL + "runs/good/checkpoints/step_0000001", "step_0000001 is not there; did you mean runs/good/checkpoints/step_00000001?"),
    (EVAL + "runs/god", "runs/god is not there; did you mean runs/good?"),
    (EVAL + "runs/goo/checkpoints/step_00000001", "is not there; did you mean runs/good/checkpoints/step_00000001?"),
    (EVAL + "elsewhere/x.safetensors", "elsewhere/x.safetensors is not there; "),
    (TRAIN + "--pretrained runs/god", "runs/god is not there; did you mean runs/good?"),
    ("predict runs/god WORLD --scene all --out out", "runs/god is not there; did you mean runs/good?"),
    ("eval bevdepth --data-root WORLD --checkpoint runs/good", "runs/good is of the recipe bevfusion_lidar (bevfusion-lidar), not of bevdepth: `bevfn eval bevfusion_lidar --checkpoint runs/good`"),
    ("eval runs/good", "eval takes a recipe first: `bevfn eval bevfusion_lidar --checkpoint runs/good`"),
    ("eval --checkpoint runs/good --split val", "eval takes a recipe first: `bevfn eval bevfusion_lidar --checkpoint runs/good --split val`"),
    ("eval --checkpoint=runs/god", "eval takes a recipe first: `bevfn eval RECIPE --checkpoint=runs/god`"),
    ("eval runs/good/checkpoints/step_00000001", "eval takes a recipe first: `bevfn eval bevfusion_lidar --checkpoint runs/good/checkpoints/step_00000001`"),
    ("eval other.safetensors", "eval takes a recipe first: `bevfn eval RECIPE --checkpoint other.safetensors`; it is one of bevfusion, "),
    ("eval runs/god", "eval takes a recipe first, and runs/god is not there; did you mean runs/good?"),
    (EVAL + "runs/good/best.pth", "runs/good/best.pth is not there; a run's checkpoints are folders: give runs/good (its best), runs/good/latest, or runs/good/checkpoints/step_..."),
    (EVAL + "runs/good/checkpoints/epoch_20.pth", "epoch_20.pth is not there; a run's checkpoints are folders: give runs/good (its best)"),
    (EVAL + "publihsed.pth", "publihsed.pth is not there; did you mean published.pth?"),
    # flags and files in the wrong place
    ("eval bevfusion --eval bbox", "there is no flag --eval; scores are always computed, by --metric nuscenes or t4, so leave it out"),
    ("eval bevfusion --show-dir x", "there is no flag --show-dir; pictures are always written, into --out, so leave it out"),
    ("parity case --json-file x", "there is no flag --json-file; it is --json here"),
    ("data check WORLD --json-file x", "there is no flag --json-file; it is --json here"),
    ("eval bevfusion_lidar runs/good --split val", "eval takes the checkpoint by its flag: `bevfn eval bevfusion_lidar --checkpoint runs/good --split val`"),
    ("train bevfusion configs/x.py", "configs/x.py is no flag: a recipe takes no config file; its numbers are flags (--help), and --config RUN takes those"),
    ("train configs/bevfusion/bevfusion_lidar.py", "train takes a recipe by its name, not a file such as configs/bevfusion/bevfusion_lidar.py; did you mean `bevfn train bevfusion_lidar`?"),
    ("eval configs/bevfusion_lidar-cam_8xb4_nus.py x.pth", "did you mean `bevfn eval bevfusion_lidar`?"),
    ("train configs/x.py", "train takes a recipe by its name, not a file such as configs/x.py; it is one of bevfusion, "),
    (EVAL + "runs/good/config.json", "runs/good/config.json holds no weights; a run's checkpoints are folders: give runs/good (its best), runs/good/latest,"),
    (EVAL + "good/config.json", "good/config.json is not there; a run's checkpoints are folders: give runs/good (its best), runs/good/latest,"),
    (EVAL + "good", "good is not there; did you mean runs/good?"),
    (EVAL + "runs/good/step_00000001", "runs/good/step_00000001 is not there; did you mean runs/good/checkpoints/step_00000001?"),
    (EVAL + "runs/good/beast", "runs/good/beast is not there; did you mean runs/good/best?"),
    (EVAL + "runs/good/xyz", "runs/good/xyz is not there; the checkpoints there are runs/good/checkpoints/step_00000001, runs/good/latest, runs/good/best"),
    (EVAL + "runs/good --split vla", "has no scene of the split 'vla'; the splits with scenes there (for --split, or a run's --train-split and --eval-split) are "),
    # going on with a run
    ("train bevfusion_lidar --run-dir runs/god --resume", "runs/god holds no run to go on with (it has no config.json); runs has the runs good; check --run-dir"),
    ("train bevfusion_lidar --resume runs/good", "--resume takes no folder: `--run-dir runs/good --resume` goes on with the run that is there"),
    ("train bevdepth --run-dir runs/good --resume", "runs/good is a run of the recipe bevfusion_lidar, not of bevdepth: `bevfn train bevfusion_lidar --run-dir runs/good --resume` goes on with it"),
    ("train bevdepth --config runs/good", "--config runs/good is of the recipe bevfusion_lidar: `bevfn train bevfusion_lidar --config runs/good`"),
    (TRAIN + "--config runs/god", "--config runs/god is not there (did you mean runs/good?); give a run's folder, or its config.json"),
    # other tools' flags
    (TRAIN + "--workdir x", "there is no flag --workdir; --run-dir is the run's folder"),
    (TRAIN + "--learning-rate=1e-3", "there is no flag --learning-rate; --lr is the peak learning rate"),
    ("eval bevfusion_lidar --resume runs/good", "there is no flag --resume; it is --checkpoint here"),
    ("eval bevfusion_lidar --work-dir x", "there is no flag --work-dir; it is --out here"),
    (TRAIN + "--work-dir x", "there is no flag --work-dir; --run-dir is the run's folder"),
    (TRAIN + "--load-from=x.pth", "there is no flag --load-from; --pretrained takes weights to start from"),
    (TRAIN + "--amp", "there is no flag --amp; --precision fp16 (or bf16) is mixed precision"),
    (TRAIN + "--cfg-options a=1", "there is no flag --cfg-options; every number of a recipe is a flag of its own"),
    (TRAIN + "--freeze camera", "there is no flag --freeze; --frozen takes paths of parameters that are not trained"),
    (TRAIN + "--config", "--config takes a run's folder, or its config.json; name one behind it"),
    (TRAIN + "--config --steps 3", "--config takes a run's folder, or its config.json; name one behind it"),
    (TRAIN + "--config=", "--config takes a run's folder, or its config.json; name one behind it"),
    # names and numbers
    ("train bevfusoin", "there is no recipe or model bevfusoin; did you mean bevfusion?"),
    ("eval bevfuson --checkpoint runs/good", "there is no recipe bevfuson; did you mean `bevfn eval bevfusion --checkpoint runs/good`?"),
    ("eval bevfusion-lidar --checkpoint runs/good", "eval takes a recipe, and bevfusion-lidar is a model of one: `bevfn eval bevfusion_lidar --model bevfusion-lidar --checkpoint runs/good`"),
    ("train bevfusion --model bevfusion-lidar", "model bevfusion-lidar is of the recipe bevfusion_lidar: `bevfn train bevfusion-lidar`; models of this one are bevfusion-lidar-camera, bevfusion-camera"),
    ("train bevfusion --model bevfusion-camra", "there is no model bevfusion-camra; did you mean `--model bevfusion-camera`?"),
    ("evaluate bevfusion", "there is no command `bevfn evaluate`; did you mean `bevfn eval`?"),
    ("test bevfusion", "there is no command `bevfn test`; did you mean `bevfn eval`?"),
    ("trian bevfusion", "there is no command `bevfn trian`; did you mean `bevfn train`?"),
    ("bevfusion --steps 3", "there is no command `bevfn bevfusion`; did you mean `bevfn train bevfusion`?"),
    ("data chek WORLD", "there is no command `bevfn data chek`; did you mean `bevfn data check`?"),
    (TRAIN + "--batch-size two", "--batch-size two must be a whole number, at least 1"),
    (EVAL + "runs/good --batch-size=two", "--batch-size two must be a whole number, at least 1"),
    (TRAIN + "--lr fast", "--lr fast must be a number, above 0"),
    ("data synth new --image-size 90 wide", "--image-size wide must be whole numbers, at least 1"),
    (EVAL + "runs/good --batch-size 0", "--batch-size 0 must be at least 1"),
    (TRAIN + "--device cuda:99", "there is no device cuda:99; "),
    ("bench step --device gpu", "device 'gpu' is none of auto, cpu, cuda, npu"),
    (TRAIN + "--device gpu", "device 'gpu' is none of auto, cpu, cuda, npu"),
    # data
    ("train bevfusion_lidar --data-root nowhere --run-dir runs/new", "nowhere"),
    ("train awml --data-root WORLD --run-dir runs/new", "is no T4 data set"),
    ("data check nowhere", "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize("words, says", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_ends_in_one_sentence_and_leaves_nothing(place, monkeypatch, capfd, words, says):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["bevfn", *words.replace("WORLD", str(small_world.index().root)).split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told, error = capfd.readouterr()
    assert end.value.code == 2 and error.startswith("bevfn: ") and error.count("\n") == 1
    assert says in error and "older bevfn" not in told
    assert sorted(place.rglob("*")) == before


def test_a_suggested_command_can_be_pasted_whatever_is_in_its_names(place, monkeypatch):
    monkeypatch.chdir(place)
    shutil.copytree("runs/good", "runs/my demo", dirs_exist_ok=True)
    for words in (["runs/my demo"], ["--checkpoint", "runs/my demo"], ["bevfusion_lidar", "runs/my demo"]):
        with pytest.raises(ValueError, match="`bevfn eval bevfusion_lidar --checkpoint 'runs/my demo'`"):
            meant.check(["eval", *words], {}, cli.COMMANDS)


def test_a_folder_behind_a_flag_of_two_numbers_is_no_third(tmp_path, monkeypatch):
    words = ["data", "synth", "--image-size", "45", "80", str(tmp_path / "w3"), "--scenes", "1", "--frames", "1"]
    monkeypatch.setattr(sys, "argv", ["bevfn", *words, "--workers", "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0 and (tmp_path / "w3" / "samples").is_dir()


def test_a_misspelt_flag_is_named_with_the_one_that_was_meant(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["bevfn", "train", "bevfusion", "--precison", "fp16"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capfd.readouterr().err
    assert end.value.code == 2 and "--precison" in error and "--precision" in error


@pytest.mark.parametrize("given", ["runs/good", "runs/good/best", "runs/good/checkpoints/step_00000001"])
def test_pretrained_takes_a_runs_folder_and_its_best(place, monkeypatch, given):
    monkeypatch.chdir(place)
    config = small_runs.config(MODEL, pretrained=(Path(given),), device="cpu")
    task = small_runs.task(config)
    started, _ = assembly.initial(tasks.Run(task, config, tasks.Plan(1, 1, 1)))
    weights = detector.load(Path(given), averages=False).params
    assert torch.equal(started["head"]["shared"]["weight"], weights["head"]["shared"]["weight"])


@pytest.mark.parametrize("recipe", [bevfusion_lidar, bevdepth, custom])
def test_a_world_of_data_synth_trains_as_made(recipe):
    """Not as nuScenes at its published size."""
    root = small_world.index().root
    assert source.is_world(root) and not source.is_world(root.parent)
    config = command_line.parse(recipe.DEFAULTS, ["--data-root", str(root)])
    made = next(iter(recipe.DEFAULTS.values()))["synthetic"]
    assert config == command_line.replace(made, data_root=root) and config.scale == "mini"
    assert command_line.parse(recipe.DEFAULTS, ["--data-root", str(root), "--scale", "published"]).scale == "published"


def test_a_world_of_another_format_is_still_refused():
    with pytest.raises(ValueError, match="is no T4 data set"):
        command_line.parse(awml.DEFAULTS, ["--data-root", str(small_world.index().root)])


@pytest.mark.parametrize("name, flags", [("bevdepth", []), ("bevdepth-2key-da", ["--model", "bevdepth-2key-da"])])
def test_train_is_the_recipes_module(monkeypatch, name, flags):
    called = []
    monkeypatch.setattr(run, "cli", lambda defaults, task, _, **how: called.append((defaults, task, how)))
    command.train(name, ("--epochs", "2"))
    how = {"arguments": [*flags, "--epochs", "2"], "prog": f"bevfn train {name}"}
    assert called == [(bevdepth.DEFAULTS, bevdepth.task, how)]


def test_train_helps_with_the_flags_of_the_recipe(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["bevfn", "train", "bevdepth-2key-da", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    told = capfd.readouterr().out
    assert told.startswith("usage: bevfn train bevdepth-2key-da ") and "--milestones" in told
    assert re.search(r"default: *bevdepth-2key-da\b", " ".join(told.split()))


def test_who_stops_reading_hears_no_complaint():
    command = f"{sys.executable} -m bevfn.cli eval --help | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stdout.startswith("usage:") and done.stderr == ""
