import gc
import json
import math
import os
import resource

import pytest
import torch
from matplotlib.backends.backend_agg import RendererAgg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams

from util.tracking.logger import RunLogger, read_log

STEPS = 4  # of one epoch


def values(epoch, **changes):
    figures = {"loss": 1 / epoch, "top1": 10.0 * epoch, "top5": 50.0 + epoch, "lr": 0.1 / epoch}
    return {**figures, "seconds": 2.5, "steps": STEPS, "images": 99, **changes}


def row(loss, seconds=3.0):
    return {"loss": loss, "top1": 3.0, "top5": 4.0, "lr": 0.1, "seconds": seconds}


def log_epoch(logger, epoch):
    for batch in range(2, STEPS + 1, 2):
        step = (epoch - 1) * STEPS + batch
        logger.batch(epoch, step, row(2 / step, 0.5 * batch))
    logger.epoch(epoch, values(epoch), values(epoch, lr=math.nan))
    logger.filters(torch.randn(8, 3, 3, 3), torch.randn(8, 1, 5, 5))


def log_run(folder, epochs, history=None, **options):
    logger = RunLogger(folder, **{"tensorboard": False, "plot": False, **options}, history=history)
    for epoch in epochs:
        log_epoch(logger, epoch)
    logger.close()
    return logger


def read_texts(folder):
    return {path.name: path.read_text() for path in sorted(folder.glob("*.log"))}


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def test_a_run_with_validation_images_has_a_third_log_and_curve(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=True, plot=True, validates=True)
    logger.epoch(1, values(1), values(1, top1=30.0), values(1, top1=20.0))
    logger.close()
    logger = RunLogger(
        tmp_path, tensorboard=False, plot=False, validates=True, history=logger.history
    )
    logger.close()
    assert read_log(tmp_path / "val.log")["top1"] == [20]
    assert read_log(tmp_path / "test.log")["top1"] == [30]
    assert [event.value for event in read_events(tmp_path).Scalars("val/top1")] == [20]
    RunLogger(tmp_path, tensorboard=False, plot=False).close()
    assert not (tmp_path / "val.log").exists()


def test_logs_have_a_header_and_one_row_for_each_call(tmp_path):
    log_run(tmp_path, [1, 2])
    assert (tmp_path / "train.log").read_text() == (
        "epoch\tloss\ttop1\ttop5\tlr\tseconds\n1\t1\t10\t51\t0.1\t2.5\n2\t0.5\t20\t52\t0.05\t2.5\n"
    )
    assert (tmp_path / "test.log").read_text() == (tmp_path / "train.log").read_text()
    batches = read_log(tmp_path / "train_batch.log")
    assert list(batches) == ["epoch", "batch", "loss", "top1", "top5", "lr", "seconds"]
    assert batches["epoch"] == [1, 1, 2, 2]
    assert batches["batch"] == [2, 4, 2, 4]
    assert batches["loss"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=1e-5)


def test_rows_can_be_read_while_the_run_goes_on(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=False, plot=False)
    assert read_log(tmp_path / "train_batch.log")["epoch"] == []
    logger.batch(1, 1, row(0.5))
    assert read_log(tmp_path / "train_batch.log")["loss"] == [0.5]
    logger.close()


def test_non_finite_values_are_written_and_read_as_such(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=True, plot=True)
    logger.batch(1, 1, row(math.inf))
    logger.epoch(1, values(1, loss=math.nan), values(1, loss=math.inf))
    logger.summary({"test_loss": math.inf, "more": {"list": [math.nan, 1.5, "text", None]}})
    logger.close()
    assert "\tinf\t" in (tmp_path / "train_batch.log").read_text()
    assert math.isnan(read_log(tmp_path / "train.log")["loss"][0])
    assert read_log(tmp_path / "test.log")["loss"] == [math.inf]
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "test_loss": None,
        "more": {"list": [None, 1.5, "text", None]},
    }


@pytest.mark.parametrize("crash", ["after a whole epoch", "within a row"])
def test_resumed_logs_equal_those_of_a_run_never_interrupted(tmp_path, crash):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    log_run(whole, [1, 2, 3])
    history = log_run(resumed, [1, 2]).history
    torch.save(history, tmp_path / "history")
    log_run(resumed, [3, 4], history) if crash == "after a whole epoch" else None
    with open(resumed / "train_batch.log", "a") as file:
        file.write("3\t2\t0.1\t0.2")
    logger = log_run(resumed, [3], torch.load(tmp_path / "history", weights_only=True))
    assert read_texts(resumed) == read_texts(whole)
    assert logger.history["step"] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_rows_of_an_epoch_under_way_stay_up_to_the_batch_asked_for(tmp_path):
    start = {"tensorboard": True, "plot": False, "start_epoch": 3, "start_step": 12}
    logger = RunLogger(tmp_path, **start)
    for step in (13, 14, 15):
        logger.batch(4, step, row(0.5))  # on disk at once: it is never closed
    again = RunLogger(tmp_path, **start, history=logger.history, batches=2)
    assert read_log(tmp_path / "train_batch.log")["batch"] == [1, 2]
    again.batch(4, 15, row(0.25))
    assert read_log(tmp_path / "train_batch.log")["loss"] == [0.5, 0.5, 0.25]
    points = read_events(tmp_path).Scalars("train/batch_loss")
    assert [(e.step, e.value) for e in points] == [(13, 0.5), (14, 0.5), (15, 0.25)]


def test_a_row_that_a_full_disk_refuses_leaves_a_whole_history(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=False, plot=False)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, most[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            logger.epoch(1, values(1), values(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    logger.epoch(2, values(2), values(2))
    assert {len(column) for column in logger.history.values()} == {2}


def test_a_history_given_is_not_changed(tmp_path):
    history = log_run(tmp_path, [1]).history
    log_run(tmp_path, [2], history)
    assert history["epoch"] == [1]


def test_resuming_into_a_fresh_folder_brings_the_epochs_along(tmp_path):
    history = log_run(tmp_path / "a", [1, 2]).history
    log_run(tmp_path / "b", [3], history)
    assert read_log(tmp_path / "b" / "test.log")["epoch"] == [1, 2, 3]
    assert read_log(tmp_path / "b" / "train_batch.log")["epoch"] == [3, 3]


def test_starting_afresh_in_a_used_folder_keeps_nothing_of_the_old_run(tmp_path):
    log_run(tmp_path, [1, 2], tensorboard=True)
    log_run(tmp_path, [1], tensorboard=True)
    assert read_log(tmp_path / "train.log")["epoch"] == [1]
    assert read_log(tmp_path / "train_batch.log")["epoch"] == [1, 1]


def test_more_metrics_of_the_test_have_columns_and_curves_and_are_resumed(tmp_path):
    options = {"tensorboard": True, "plot": False, "test_columns": ("ema_top1",)}
    history = None
    for epoch in (1, 2):
        logger = RunLogger(tmp_path, **options, history=history)
        logger.epoch(epoch, values(epoch), values(epoch, ema_top1=20.0 * epoch))
        logger.close()
        history = logger.history
    test = read_log(tmp_path / "test.log")
    assert list(test)[-2:] == ["seconds", "ema_top1"] and test["ema_top1"] == [20, 40]
    assert "ema_top1" not in read_log(tmp_path / "train.log")
    points = read_events(tmp_path).Scalars("test/ema_top1")
    assert [(point.step, point.value) for point in points] == [(4, 20.0), (8, 40.0)]


def test_tensorboard_has_every_curve_and_the_filters(tmp_path):
    log_run(tmp_path, [1, 2], tensorboard=True)
    events = read_events(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        *(f"{part}/{key}" for part in ("train", "test") for key in ("loss", "top1", "top5")),
        *("train/batch_loss", "train/batch_top1", "lr", "time/images_per_second"),
    }
    (speed, _) = events.Scalars("time/images_per_second")
    assert (speed.step, speed.value) == (4, pytest.approx(99 / 2.5))
    assert [(e.step, e.value) for e in events.Scalars("test/top1")] == [(4, 10.0), (8, 20.0)]
    assert [e.step for e in events.Scalars("lr")] == [2, 4, 6, 8]
    assert set(events.Tags()["images"]) == {"weights/first_layer", "weights/first_layer_whitened"}
    image = events.Images("weights/first_layer")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > 90 and image.height > 90


def test_tensorboard_does_not_show_resumed_steps_twice(tmp_path):
    history = log_run(tmp_path, [1, 2], tensorboard=True).history
    log_run(tmp_path, [3, 4], history, tensorboard=True)
    log_run(tmp_path, [3], history, tensorboard=True)
    events = read_events(tmp_path)
    assert [e.step for e in events.Scalars("train/loss")] == [4, 8, 12]
    assert [e.step for e in events.Scalars("train/batch_loss")] == [2, 4, 6, 8, 10, 12]
    assert [e.step for e in events.Images("weights/first_layer")] == [4, 8, 12]


def test_tensorboard_shows_the_flags_of_the_last_start_and_whether_it_finished(tmp_path):
    """TensorBoard keeps the first hyperparameters that it reads."""
    for epochs in (2, 3):
        flags = {
            "epochs": epochs,
            "milestone": [60.0, 80.0],
            "gpu": None,
            "lr": 0.5,
            "deconv": True,
        }
        logger = RunLogger(tmp_path, tensorboard=True, plot=False, flags=flags)
        assert hparams.SESSION_END_INFO_TAG not in read_events(tmp_path).summary_metadata
        logger.finished()
        logger.close()
    events = read_events(tmp_path)
    (page,) = events.Tensors("flags/text_summary")
    table = page.tensor_proto.string_val[0].decode()
    assert "| epochs | `3` |\n| milestone | `[60.0, 80.0]` |\n| gpu | `None` |\n" in table
    start, end = (
        events.summary_metadata[tag].plugin_data.content
        for tag in (hparams.SESSION_START_INFO_TAG, hparams.SESSION_END_INFO_TAG)
    )
    values = hparams.parse_session_start_info_plugin_data(start).hparams
    assert values["epochs"].number_value == 3 and values["deconv"].bool_value
    assert values["milestone"].string_value == "[60.0, 80.0]" and "gpu" not in values
    status = hparams.parse_session_end_info_plugin_data(end).status
    assert api_pb2.Status.Name(status) == "STATUS_SUCCESS"


def test_without_tensorboard_and_plot_only_logs_are_left(tmp_path):
    log_run(tmp_path, [1])
    assert {path.suffix for path in tmp_path.iterdir()} == {".log"}
    log_run(tmp_path, [1], plot=True)
    assert (tmp_path / "TrainingPlots.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_whose_name_is_no_text_gets_its_curves(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff \x1b[31m $x^$\n")
    log_run(folder, [1], plot=True)
    assert (folder / "TrainingPlots.png").stat().st_size > 0


def test_no_drawing_waits_for_the_collector(tmp_path):
    gc.disable()  # that which comes by itself
    try:
        log_run(tmp_path, [1], plot=True)
        assert not any(type(thing) is RendererAgg for thing in gc.get_objects())
    finally:
        gc.enable()


def test_tensorboard_has_the_figures_of_layers_after_the_last_epoch(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=True, plot=False)
    log_epoch(logger, 1)
    logger.layers({"whiteness/after/conv1": 0.5})
    logger.close()
    (event,) = read_events(tmp_path).Scalars("whiteness/after/conv1")
    assert (event.step, event.value) == (STEPS, 0.5)


def test_filters_can_be_left_out(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=True, plot=False)
    logger.filters(torch.randn(8, 3, 3, 3), None)
    logger.close()
    assert read_events(tmp_path).Tags()["images"] == ["weights/first_layer"]


def test_a_log_that_is_no_table_of_numbers_is_refused_by_file_and_line(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("epoch\tloss\n1\t0.5\n2\n")
    with pytest.raises(ValueError, match=r"train\.log, line 3: 1 values for the 2 columns"):
        read_log(path)
    path.write_text("epoch\tloss\nx\t0.5\n")
    with pytest.raises(ValueError, match=r"train\.log, line 2: .*'x'"):
        read_log(path)


def test_what_is_no_log_is_replaced_and_not_waited_for(tmp_path):
    (tmp_path / "precious").write_text("precious")
    os.mkfifo(tmp_path / "train_batch.log")
    (tmp_path / "train.log").symlink_to(tmp_path / "precious")
    RunLogger(tmp_path, tensorboard=False, plot=False, batches=1).close()
    for name in ("train.log", "train_batch.log"):
        assert (tmp_path / name).read_text().startswith("epoch\t")
    assert (tmp_path / "precious").read_text() == "precious"
