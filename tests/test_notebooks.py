"""The notebooks' code cells run in order, on a tiny world and a detector of two steps, and what they tell is true.

With all backends, inductor's minutes included: `pytest -m slow tests/test_notebooks.py`.
"""

import ast
import base64
import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from bevfn import CONVERTERS

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 400_000  # bytes of a notebook, of which the pictures are most
HAS_CONVERTERS = Path(CONVERTERS).is_dir() or importlib.util.find_spec("torch_npu") is not None
SMALL = {
    "5_own_parts": {"STEPS": 2},
    "7_graph": {"BACKENDS": ("eager", "aot_eager"), "ASCEND": False},
    "8_own_data": {"STEPS": 2},
}


@pytest.fixture(scope="module")
def example(tmp_path_factory, bare_runs):
    """notebooks/example.py as the notebooks import it, with everything tiny."""
    with pytest.MonkeyPatch.context() as patch, bare_runs():
        patch.syspath_prepend(str(FOLDER))
        import example
        import execute

        folder = tmp_path_factory.mktemp("notebooks")
        for name, value in {"RUNS": folder, "FRAMES": 2, "IMAGE": (90, 160), "STEPS": 2}.items():
            patch.setattr(example, name, value)
        patch.setattr(example, "execute", execute, raising=False)
        matplotlib.use("Agg")
        yield example
        plt.close("all")


def cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def checked(example, name: str, sizes: dict[str, Any] | None = None) -> SimpleNamespace:
    """Runs a notebook: its names at the end, and `last`, what its last cell shows. The cells that show figures, which can be
    drawn, are those of which figures are stored."""
    path, sizes = FOLDER / f"{name}.ipynb", SMALL.get(name, {}) if sizes is None else sizes
    names, shown = example.execute.run(path, sizes)
    for number, (cell, of_cell) in enumerate(zip(cells(path), shown)):
        figures = [figure for one in of_cell if (figure := example.execute.figure_of(one)) is not None]
        for figure in figures:
            figure.savefig(io.BytesIO(), dpi=20)
        if sizes.get("ASCEND", True) or "if ASCEND" not in "".join(cell["source"]):
            stored = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
            assert len(figures) == stored, (
                f"cell {number} shows {len(figures)} figures, {stored} are stored: notebooks/execute.py"
            )
    return SimpleNamespace(**names, last=shown[-1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran_from_top_to_bottom(path):
    made = cells(path)
    assert path.stat().st_size <= LIMIT and len(made) <= 11
    assert [cell["execution_count"] for cell in made] == list(range(1, len(made) + 1))
    outputs = [output for cell in made for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not [output for output in outputs if " object at 0x" in json.dumps(output)]  # a last value that says nothing
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    for picture in pictures:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L"))
        assert min(image.shape) > 150 and image.std() > 5


def test_the_readme_lists_every_notebook():
    readme = (FOLDER.parent / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS if f"](notebooks/{path.name})" not in readme] == []
    assert [path.stem for path in NOTEBOOKS if f"](docs/img/notebook_{path.stem}.png)" not in readme] == []


def test_a_key_frame_and_its_data(example):
    made = checked(example, "1_frame")
    assert len(made.index) == example.FRAMES and made.batch.images.shape[:3] == (2, 1, 6)
    assert (made.many.points[:, 4] > 0).any()  # sweeps
    assert not torch.equal(made.batch.base_aug[0], made.batch.base_aug[1])


def test_weights_on_a_frame(example):
    made = checked(example, "2_detect")
    (said,) = made.last
    assert "(of bevfusion-lidar-camera, mini size) does not fit bevfusion-lidar-camera, published size" in said
    assert made.counted[0].recall >= made.counted[-1].recall


def test_boundaries(example):
    made = checked(example, "3_boundaries")
    torch.testing.assert_close(made.depth.sum(0), torch.ones_like(made.depth[0]))
    torch.testing.assert_close(made.weights.sum((1, 2)), torch.ones(len(made.weights)))
    assert made.lidar.max() > 1.0


def test_gradients(example):
    made = checked(example, "4_gradients")
    assert made.reverse > 0 and made.reverse == pytest.approx(made.forward, rel=1e-3)
    assert (
        made.by_point.abs().max() > 0
    )  # two steps taught it little: the slope by the image is below the rounding of a difference
    (stored,) = cells(FOLDER / "4_gradients.ipynb")[3]["outputs"]
    reverse, forward, difference = ast.literal_eval("".join(stored["data"]["text/plain"]))
    assert reverse == pytest.approx(forward, rel=1e-3) and reverse == pytest.approx(difference, rel=0.05)
    assert made.last[-1].value < 1e-3  # a sample's gradient is that of the sample alone
    assert made.jacobian.shape == (7, 3) and made.jacobian.abs().max() > 0


def test_own_parts(example):
    made = checked(example, "5_own_parts")
    assert len(made.losses) == 2 and np.isfinite(made.losses).all()
    occupied = made.target(made.batches[0])
    assert 0 < occupied.mean() < 0.2
    frozen, trained = (made.train_state.params["camera"]["backbone"], made.trained.params["camera"]["backbone"])
    assert torch.equal(frozen["patch_embed"]["conv"]["weight"], trained["patch_embed"]["conv"]["weight"])


def test_failures(example):
    made = checked(example, "6_failures")
    assert len(made.hits) == sum(counted.annotated for counted in made.ranking.frames)
    assert len(made.errors) == made.right.sum()


def test_graph_and_eager(example):
    made = checked(example, "7_graph")
    assert max(made.apart["aot_eager"].values()) < 1e-3 and set(made.apart) == {"eager", "aot_eager"}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CONVERTERS, reason="torch_npu's converters are not here: `make npu`")
def test_graph_and_eager_with_all_backends(example):
    made = checked(example, "7_graph", {})
    assert set(made.apart) == {"eager", "aot_eager", "inductor", "Ascend"}
    assert max(max(errors.values()) for errors in made.apart.values()) < 1e-2


def test_own_data(example):
    made = checked(example, "8_own_data")
    assert made.model.classes == ("car", "person") and len(made.index) == 8
