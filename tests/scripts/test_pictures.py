"""Pictures are made whatever the length, at bounded memory."""

import matplotlib.image

from kernels.patterns import Dense, Window
from scripts.pictures import draw_loss_by_position, draw_patterns


def test_a_pattern_of_a_million_tokens_is_drawn(tmp_path):
    file = tmp_path / "report" / "pattern.png"
    draw_patterns({"window": Window(1024), "dense": Dense()}, 1 << 20, file)
    image = matplotlib.image.imread(file)
    assert image.shape[1] > 2 * 300 and image[..., :3].std() > 0.1


def test_loss_by_position_is_drawn(tmp_path):
    bucket = {"start": 0, "stop": 512, "tokens": 512, "loss": 3.0, "low": 2.9, "high": 3.1}
    rows = [{"by_position": [bucket, bucket | {"start": 512, "stop": 1024, "loss": 2.5}]}] * 2
    draw_loss_by_position(rows, ["a", "b"], tmp_path / "loss.png")
    assert matplotlib.image.imread(tmp_path / "loss.png")[..., :3].std() > 0.01
