"""The three kinds of optimizers take the steps their owners say, and none touches another fit's parameters."""

from __future__ import annotations

import copy
import functools

import pyro
import pytest
import torch

from pyro_sivism.errors import NonFiniteError, OptimizerError
from pyro_sivism.optimizers import check_optimizer, clip_gradients, make_stepper

DEFAULTS = {"lr": 0.1, "betas": (0.9, 0.99)}


def parameters(values=(1.0, 2.0)):
    return {f"fit.p{i}": torch.nn.Parameter(torch.tensor([v, -v])) for i, v in enumerate(values)}


def gradients(params):
    return [torch.full_like(p, 0.5 + i) for i, p in enumerate(params.values())]


def values(params):
    return [p.detach().clone() for p in params.values()]


def scheduler():
    return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})


ALL_KINDS = {
    "default": lambda: None,
    "Adam": lambda: pyro.optim.Adam({"lr": 0.1}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9}),
    "per_parameter": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1}),
    "clip_args": lambda: pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 0.1}),
    "scheduler": scheduler,
    "class": lambda: torch.optim.Adam,
    "partial": lambda: functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "lambda": lambda: lambda params: torch.optim.RMSprop(params, lr=0.1),
}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_resuming_from_the_state_is_the_same_as_going_on(kind):
    params = parameters()
    stepper = make_stepper(ALL_KINDS[kind](), params, "optim", **DEFAULTS)
    for _ in range(3):
        stepper.step(gradients(params), 1.0)
    assert all(p.grad is None for p in params.values())

    resumed_params = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    resumed = make_stepper(ALL_KINDS[kind](), resumed_params, "optim", **DEFAULTS)
    resumed.load_state_dict(copy.deepcopy(stepper.state_dict()))
    # saved again before any step, nothing is lost
    assert str(resumed.state_dict()) == str(stepper.state_dict())
    for _ in range(2):
        stepper.step(gradients(params), 1.0)
        resumed.step(gradients(resumed_params), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(values(params), values(resumed_params)))


@pytest.mark.parametrize("kind", ["Adam", "class", "default"])
def test_each_kind_is_torchs_adam(kind):
    params = parameters()
    reference = [p.detach().clone().requires_grad_() for p in params.values()]
    adam = torch.optim.Adam(reference, lr=1e-3 if kind == "class" else 0.1)
    stepper = make_stepper(ALL_KINDS[kind](), params, "optim", lr=0.1, betas=(0.9, 0.999))
    for _ in range(3):
        stepper.step(gradients(params), 1.0)
        for p, g in zip(reference, gradients(params)):
            p.grad = g
        adam.step()
    for got, want in zip(values(params), reference):
        assert torch.allclose(got, want, rtol=1e-6)


def test_the_schedule_moves_the_default_only():
    for kind, factor in (("default", 0.25), ("Adam", 1.0), ("partial", 1.0)):
        params = parameters()
        before = values(params)
        make_stepper(ALL_KINDS[kind](), params, "optim", **DEFAULTS).step(gradients(params), 0.25)
        moved = (before[0] - values(params)[0]).abs()
        first_step = 0.1 * 0.5 if kind == "partial" else 0.1  # SGD moves by lr times gradient, Adam by lr
        assert torch.allclose(moved, torch.tensor(first_step * factor), rtol=1e-4)


def test_slow_parameters_move_less():
    params = parameters()
    before = values(params)
    slow = [params["fit.p0"]]
    make_stepper(None, params, "optim", **DEFAULTS, slow_params=slow, slow_factor=0.1).step(gradients(params), 1.0)
    moved = [(a - b).abs() for a, b in zip(before, values(params))]
    assert torch.allclose(moved[0], torch.tensor(0.01), rtol=1e-4)
    assert torch.allclose(moved[1], torch.tensor(0.1), rtol=1e-4)


def test_a_users_scheduler_is_stepped_by_the_user():
    params, optim = parameters(), scheduler()
    stepper = make_stepper(optim, params, "optim", **DEFAULTS)
    stepper.step(gradients(params), 1.0)
    optim.step()
    rates = [o.optimizer.param_groups[0]["lr"] for o in optim.optim_objs.values()]
    assert rates == [0.05, 0.05]


def test_per_parameter_arguments_see_the_names():
    seen = []

    def arguments(name):
        seen.append(name)
        return {"lr": 0.0 if name.endswith("p0") else 0.1}

    params = parameters()
    before = values(params)
    make_stepper(pyro.optim.Adam(arguments), params, "optim", **DEFAULTS).step(gradients(params), 1.0)
    assert seen == ["fit.p0", "fit.p1"]
    assert torch.equal(values(params)[0], before[0])
    assert not torch.equal(values(params)[1], before[1])


def test_parameters_without_a_gradient_stay():
    for kind in ("default", "Adam", "class"):
        params = parameters()
        before = values(params)
        stepper = make_stepper(ALL_KINDS[kind](), params, "optim", **DEFAULTS)
        stepper.step([None, gradients(params)[1]], 1.0)
        assert torch.equal(values(params)[0], before[0])
        assert not torch.equal(values(params)[1], before[1])
        stepper.state_dict()


def test_fits_of_one_name_and_one_optimizer_keep_apart():
    store, optim = pyro.get_param_store(), pyro.optim.Adam({"lr": 0.1})
    first, second = parameters(), parameters((5.0,))
    steppers = [make_stepper(optim, params, "optim", **DEFAULTS) for params in (first, second)]
    assert store.param_name(first["fit.p0"]) == "fit.p0"
    assert store.param_name(second["fit.p0"]) == "fit.p0_1"
    assert store._params["fit.p0"] is first["fit.p0"]
    for stepper, params in zip(steppers, (first, second)):
        stepper.step(gradients(params), 1.0)
    assert set(optim.get_state()) == {"fit.p0", "fit.p1", "fit.p0_1"}
    assert [set(stepper.state_dict()) for stepper in steppers] == [{"fit.p0", "fit.p1"}, {"fit.p0"}]


def test_parameters_of_the_store_keep_their_names():
    pyro.param("scale", torch.tensor(2.0), constraint=torch.distributions.constraints.positive)
    leaf = pyro.get_param_store()._params["scale"]
    make_stepper(pyro.optim.Adam({"lr": 0.1}), {"scale": leaf}, "optim", **DEFAULTS)
    assert set(pyro.get_param_store()) == {"scale"}


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ("Adam", "optim is a str; expected"),
        ({"lr": 0.1}, "optim is a dict; expected"),
        (torch.optim.SGD([torch.zeros(1)], lr=0.1), "already bound to parameters.*functools.partial"),
    ],
    ids=["string", "dict", "torch_instance"],
)
def test_wrong_kinds_are_refused_at_once(optim, message):
    with pytest.raises(OptimizerError, match=message):
        check_optimizer(optim, "optim")


def needs_lr(params, lr):
    return torch.optim.SGD(params, lr=lr)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (pyro.optim.Adam, "could not be called with a list of parameters"),
        (needs_lr, "missing 1 required positional argument: 'lr'"),
        (functools.partial(torch.optim.Adam, lr=-1.0), "Invalid learning rate"),
        (len, "returned a int"),
        (torch.optim.LBFGS, "LBFGS, which evaluates the loss several times"),
    ],
    ids=["pyro_factory", "no_lr", "negative_lr", "no_optimizer", "closure"],
)
def test_wrong_factories_say_what_is_wrong(optim, message):
    with pytest.raises(OptimizerError, match=message):
        make_stepper(optim, parameters(), "optim", **DEFAULTS)


def test_clip_gradients_scales_the_total_norm():
    clipped = clip_gradients([torch.tensor([3.0]), None, torch.tensor([4.0])], 1.0, "guide").gradients
    assert clipped[1] is None
    assert torch.allclose(torch.cat([clipped[0], clipped[2]]), torch.tensor([0.6, 0.8]))
    short = clip_gradients([torch.tensor([0.3]), torch.tensor([0.4])], 1.0, "guide").gradients
    assert torch.allclose(torch.cat(short), torch.tensor([0.3, 0.4]))


def test_clip_gradients_does_not_overflow():
    """The square of 1e25 is beyond float32."""
    clipped = clip_gradients([torch.tensor([3e25]), torch.tensor([4e25])], 1.0, "guide").gradients
    assert {g.dtype for g in clipped} == {torch.float32}
    torch.testing.assert_close(torch.cat(clipped), torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clip_gradients_refuses_what_is_not_finite(bad):
    with pytest.raises(NonFiniteError, match="guide's gradient is not finite; the guide was left as it is"):
        clip_gradients([torch.tensor([1.0, bad])], 1.0, "guide")
