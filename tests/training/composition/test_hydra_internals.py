"""The private part of Hydra is there, and means what it did in Hydra 1.3."""

from syncbn.training.composition import hydra_internals


def test_hydras_parser_is_where_it_was() -> None:
    options = hydra_internals.argument_parser().parse_args(["-m", "-cd", "a", "-cn", "b", "-cp", "c", "d=1"])
    assert (options.config_dir, options.config_name, options.config_path) == ("a", "b", "c")
    assert options.overrides == ["d=1"]
    assert options.multirun
