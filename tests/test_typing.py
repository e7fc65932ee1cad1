"""Type checkers and `help` show the public functions' options, and both take them from the same definitions."""

import dataclasses
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import jax_flash
from jax_flash import dot_product, options, spec, validate
from jax_flash.compat import flash_attn
from jax_flash.compat import options as compat_options
from jax_flash.paged import validate as paged_validate

ROOT = Path(__file__).parent.parent
RESULTS = {"return_lse", "return_max"}
FUNCTIONS = {  # the TypedDict of the overloads' options, and the options in which overloads differ
    jax_flash.flash_attention: (options.FixedOptions, RESULTS),
    jax_flash.flash_attention_varlen: (options.VarlenOptions, RESULTS),
    jax_flash.paged_attention: (options.PagedOptions, RESULTS),
    jax_flash.ring_attention: (options.RingOptions, RESULTS),
    jax_flash.dot_product_attention: (options.DotProductOptions, {"return_residual"}),
    flash_attn.flash_attn_func: (compat_options.FlashAttnOptions, {"return_attn_probs"}),
    flash_attn.flash_attn_varlen_func: (compat_options.FlashAttnVarlenOptions, {"return_attn_probs"}),
    flash_attn.flash_attn_qkvpacked_func: (compat_options.FlashAttnOptions, {"return_attn_probs"}),
    flash_attn.flash_attn_kvpacked_func: (compat_options.FlashAttnOptions, {"return_attn_probs"}),
    flash_attn.flash_attn_varlen_qkvpacked_func: (compat_options.FlashAttnOptions, {"return_attn_probs"}),
    flash_attn.flash_attn_varlen_kvpacked_func: (compat_options.FlashAttnOptions, {"return_attn_probs"}),
    flash_attn.flash_attn_with_kvcache: (compat_options.KVCacheOptions, {"return_softmax_lse"}),
}
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def test_mypy_sees_what_the_file_of_uses_says():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict"]  # pyproject.toml allows untyped calls of jax
    found = subprocess.run(
        [*command, "tests/typed_uses.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "Success: no issues found in 1 source file" in found.stdout, found.stdout + found.stderr


@each_function
def test_the_overloads_have_the_options_of_the_signature_with_the_same_types(function):
    wanted, differs = FUNCTIONS[function]
    named = {
        overload: set(inspect.signature(overload).parameters) - {"options", "named"}
        for overload in typing.get_overloads(function)
    }
    assert named
    written = typing.get_type_hints(function)
    listed = typing.get_type_hints(wanted)
    assert any("unpacked" in parameters for parameters in named.values())
    for overload, parameters in named.items():
        # The overload for options by position has no option names to compare.
        if "unpacked" not in parameters and "named" not in inspect.signature(overload).parameters:
            assert parameters | set(listed) == set(inspect.signature(function).parameters)
            assert differs <= parameters
            assert not parameters & set(listed)
    assert {name: written[name] for name in listed} == listed


ARGUMENTS = {  # the value that a function fills, and the checks that it passes it to
    jax_flash.flash_attention: (options.FixedArguments, validate, "fixed"),
    jax_flash.flash_attention_varlen: (options.VarlenArguments, validate, "varlen"),
    jax_flash.ring_attention: (options.RingArguments, validate, "ring"),
    jax_flash.paged_attention: (options.PagedArguments, paged_validate, "attention"),
    jax_flash.append_kv: (options.AppendArguments, paged_validate, "append"),
    jax_flash.dot_product_attention: (dot_product.DotProductArguments, dot_product, "spec_and_operands"),
}
each_value = pytest.mark.parametrize("function", ARGUMENTS, ids=lambda f: f.__name__)


@each_value
def test_a_calls_arguments_are_those_of_the_signature_with_the_same_types_and_defaults(function):
    value = ARGUMENTS[function][0]
    written = {name: x for name, x in typing.get_type_hints(function).items() if name != "return"}
    assert typing.get_type_hints(value) == written
    defaults = {field.name: field.default for field in dataclasses.fields(value)}
    for name, parameter in inspect.signature(function).parameters.items():
        none = parameter.default is parameter.empty
        assert defaults[name] == (dataclasses.MISSING if none else parameter.default), name


@each_value
def test_a_function_passes_on_each_of_its_arguments(function, monkeypatch):
    class Passed(Exception):
        pass

    def check(op, arguments):
        assert op == function.__name__
        raise Passed(vars(arguments))

    _, module, name = ARGUMENTS[function]
    monkeypatch.setattr(module, name, check)
    given = {name: object() for name in inspect.signature(function).parameters}
    with pytest.raises(Passed) as passed:
        function(**given)
    assert passed.value.args[0] == given


@each_function
def test_help_says_what_each_argument_means(function):
    arguments = inspect.getdoc(function).split("Args:")[1].split("Returns:")[0]
    for name in inspect.signature(function).parameters:
        assert name in arguments, name


def test_literals_are_the_values_that_are_allowed():
    assert typing.get_args(options.Align) == spec.ALIGNMENTS
    assert typing.get_args(options.PageLayout) == spec.PAGE_LAYOUTS
    assert typing.get_args(options.Implementation) == validate.IMPLEMENTATIONS
    assert typing.get_args(options.Order) == spec.ORDERS


def test_the_package_says_that_it_is_typed():
    assert (Path(jax_flash.__file__).parent / "py.typed").exists()
