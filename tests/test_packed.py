"""Linear layers laid for inference (model/packed.py): the same results, in bf16 to the bit, and the same parameters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nextvec.model.packed import PackedLinear, can_pack, pack_linears


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("rows", [1, 2, 7, 200])
def test_packed_layers_give_the_same_bits(rows: int) -> None:
    net = nn.Sequential(nn.Linear(96, 160), nn.SiLU(), nn.Linear(160, 33, bias=False)).bfloat16()
    twin = copy.deepcopy(net)
    pack_linears(net)
    packed = PackedLinear if can_pack() else nn.Linear
    assert [type(layer) for layer in net] == [packed, nn.SiLU, packed]
    assert net.state_dict().keys() == twin.state_dict().keys()
    x = torch.randn(rows, 96, generator=seeded()).bfloat16()
    with torch.inference_mode():
        assert torch.equal(net(x), twin(x))
    with torch.no_grad():
        for each in (net, twin):
            each[0].weight.mul_(-2)
    with torch.inference_mode():
        assert torch.equal(net(x), twin(x))  # packed again after a change
    net(x).sum().backward()  # with gradients it is the plain layer
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_float32_layers_with_more_outputs_than_inputs_give_the_same_to_rounding(rows: int) -> None:
    net = nn.Sequential(nn.Linear(64, 192), nn.SiLU(), nn.Linear(192, 64), nn.Linear(64, 96, bias=False))
    twin = copy.deepcopy(net)
    pack_linears(net)
    assert [type(layer) for layer in net] == [PackedLinear, nn.SiLU, nn.Linear, PackedLinear]
    assert net.state_dict().keys() == twin.state_dict().keys()
    x = torch.randn(rows, 1, 64, generator=seeded())
    for _ in range(2):
        with torch.inference_mode():
            assert torch.allclose(net(x), twin(x), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for each in (net, twin):
                each[3].weight.mul_(-2)  # laid anew after a change
    pickled = pickle.loads(pickle.dumps(net))
    assert torch.equal(pickled(x), net(x))
    assert torch.equal(net(x), twin(x))  # with gradients it is the plain layer
    net(x).sum().backward()
    assert net[0].weight.grad is not None


def test_a_row_alone_is_read_by_columns() -> None:
    """Which costs a second copy of the matrix, so it has to be used."""
    layer = nn.Sequential(nn.Linear(3, 5, bias=False))
    pack_linears(layer)
    strides = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.linear:
                strides.append(args[1].stride())
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Seen():
        for rows in (1, 2, 3):
            layer(torch.ones(rows, 3))
    assert strides == [(1, 5), (1, 5), (3, 1)]


def test_layers_that_gain_nothing_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8).double())
    pack_linears(net)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear]
