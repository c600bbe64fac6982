from __future__ import annotations

from typing import Any

import pytest

from fitune.config.cautions import cautions
from fitune.config.schema import RunConfig
from fitune.train.loop import learning_rate


def config_of(**settings: Any) -> RunConfig:
    data = {"train": ["a.jsonl"], **settings.pop("data", {})}
    return RunConfig.model_validate({"data": data, **settings})


def test_rates_of_the_other_method() -> None:
    (said,) = cautions(config_of(method="full", train={"learning_rate": 2e-4}))
    assert "0.0002 is an adapter's" in said
    (said,) = cautions(config_of(method="lora", train={"learning_rate": 1e-5}))
    assert "1e-05 is one for all weights" in said
    for method in ("full", "lora", "qlora"):
        config = config_of(method=method)
        given = config.model_copy(
            update={"train": config.train.model_copy(update={"learning_rate": learning_rate(config)})}
        )
        assert list(cautions(config)) == list(cautions(given)) == []


def test_rates_of_the_other_optimizer() -> None:
    (said,) = cautions(config_of(method="lora", train={"optimizer": "lion", "learning_rate": 2e-4}))
    assert "lion takes a third to a tenth" in said
    assert not list(cautions(config_of(method="lora", train={"optimizer": "lion", "learning_rate": 1e-5})))
    for method in ("full", "lora", "qlora"):
        usual = learning_rate(config_of(method=method))
        assert learning_rate(config_of(method=method, train={"optimizer": "lion"})) == pytest.approx(usual / 5)
        assert learning_rate(config_of(method=method, train={"optimizer": "adafactor"})) == usual


def test_training_on_the_prompt() -> None:
    (said,) = cautions(config_of(data={"train_on": "all"}))
    assert "learns the questions too" in said
    assert not list(cautions(config_of(data={"train": [{"path": "a.txt", "format": "text"}], "train_on": "all"})))


@pytest.mark.parametrize(("train", "count"), [({"epochs": 20.0}, 1), ({"epochs": 3.0}, 0), ({"steps": 9}, 0)])
def test_many_epochs(train: dict[str, Any], count: int) -> None:
    assert len(list(cautions(config_of(train=train)))) == count


def test_preferences() -> None:
    (said,) = cautions(config_of(train={"objective": "dpo", "learning_rate": 2e-4}))
    assert "dpo takes about 5e-6" in said
    assert not list(cautions(config_of(train={"objective": "dpo", "learning_rate": 5e-6})))
    (said,) = cautions(config_of(train={"objective": "dpo"}, lora={"start_from": "runs/first"}))
    assert "merge it first" in said
