"""A fit on many processes: as on one, agreed on, reproducible, and ended by an error when a process dies."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_sivism import SIVISM, Checkpoint, FisherDivergence, FixedGaussian, PathGradientKL, Ranks, ScoreNetwork, cycles
from pyro_sivism.errors import ArgumentError, DistributedError, NonFiniteError, NonFiniteWarning
from pyro_sivism.family import DiagonalNormal, SemiImplicit
from pyro_sivism.recipe import Recipe
from pyro_sivism.training import Training

# --- launching ----------------------------------------------------------------------------------------

# A server imports what takes long once, before any thread is started, and forks the processes.
_workers = multiprocessing.get_context("forkserver")
_workers.set_forkserver_preload(["pyro_sivism", "pytest", "torch._dynamo"])


def _start(job, folder, size, environments=None):
    """Start ``job(rank, folder)`` on ``size`` processes, which leave their results in ``folder``."""
    environments = environments or [{}] * size
    processes = [_workers.Process(target=_enter, args=(job, r, size, folder, environments[r])) for r in range(size)]
    for process in processes:
        process.start()
    return processes


def _enter(job, rank, size, folder, environment):
    torch.set_num_threads(1)
    os.environ.update(environment)
    if not environment:
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    result = job(rank, folder)
    (folder / f"result_{rank}").write_bytes(pickle.dumps(result))


def _finish(processes, folder, killed=()):
    """Wait for the processes and return what they returned, in the order of ranks."""
    for process in processes:
        process.join(100)
        if process.is_alive():
            process.kill()
    codes = [process.exitcode for process in processes]
    assert codes == [-signal.SIGKILL if rank in killed else 0 for rank in range(len(processes))], "see stderr"
    return {r: pickle.loads((folder / f"result_{r}").read_bytes()) for r in range(len(processes)) if r not in killed}


def _launch(job, folder, size=2, **kwargs):
    return _finish(_start(job, folder, size, **kwargs), folder)


def _torchrun_environments(size):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), **shared} for rank in range(size)]


# --- models -------------------------------------------------------------------------------------------

DATA = torch.linspace(-1.0, 3.0, 40)[:, None] * torch.tensor([1.0, -2.0])


def normal_mean(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def minibatched(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    noise = pyro.param("noise", torch.tensor(2.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y), subsample_size=10) as rows:
        pyro.sample("y", dist.Normal(mu, noise).to_event(1), obs=y[rows])


class _ShortWarmUp(PathGradientKL):
    def adapt_recipe(self, recipe):
        return replace(recipe, critic_warmup_steps=2)


def _small(model=normal_mean, num_particles=5, loss=None):
    """A fit whose set-up costs next to nothing."""
    gaussian = FixedGaussian(torch.zeros(2), torch.ones(2))
    return SIVISM(model, loss=loss or _ShortWarmUp(), num_particles=num_particles, preconditioner=gaussian)


def _state(sivism):
    """Everything that must agree between ranks."""
    training = sivism._training
    modules = (sivism.guide, training.family, training.critic)
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += [*sivism.target.params().values()]
    return [tensor.detach().tolist() for tensor in tensors]


# --- the same gradients -------------------------------------------------------------------------------


class _CutGaussian:
    """N(loc, I), with scores that are NaN where the first coordinate is above a cut."""

    dim = 2

    def __init__(self, cut):
        self.loc, self.cut = torch.tensor([0.5, -1.0], dtype=torch.double, requires_grad=True), cut

    def log_density(self, x):
        return torch.where(x[:, 0] > self.cut, torch.nan, -0.5 * (x - self.loc).square().sum(-1))

    def score(self, x):
        return torch.where(x[:, :1] > self.cut, torch.nan, -(x - self.loc.detach()) * (1.0 + x.square()))


class _Recorder(torch.optim.SGD):
    """Gradient descent that remembers the gradients."""

    def __init__(self, params, log):
        super().__init__(params, lr=0.01)
        self.log = log

    def step(self, closure=None):
        self.log += [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def _given_noise(ranks, total):
    """Stand-ins for ``randn`` and ``randn_like`` that give each rank its rows of what one process would draw."""
    generator = torch.Generator().manual_seed(7)
    sizes = [total // ranks.size + (r < total % ranks.size) for r in range(ranks.size)]
    start = sum(sizes[: ranks.rank])

    def randn(shape, dtype=None, device=None):
        assert shape[0] == sizes[ranks.rank]
        return torch.empty(total, *shape[1:], dtype=dtype).normal_(generator=generator)[start : start + shape[0]]

    return randn, lambda like: randn(like.shape, like.dtype)


def _gradients(ranks, objective, cut):
    """All gradients and reports of three steps with seven particles."""
    torch.manual_seed(1)
    recipe = replace(Recipe.for_dim(2), num_particles=7, clip_norm=1e9)
    family = SemiImplicit(DiagonalNormal(2, 2, (8,))).double()
    averaged = SemiImplicit(DiagonalNormal(2, 2, (8,))).double()
    critic, target, log = ScoreNetwork(2, (8,)).double(), _CutGaussian(cut), []
    optim = lambda params: _Recorder(params, log)  # noqa: E731 - it is what a user would pass
    training = Training(
        family, averaged, critic, objective, recipe, optim=optim, critic_optim=optim, name="q", ranks=ranks
    )
    training.connect(target, target, {"loc": target.loc})
    randn, randn_like = torch.randn, torch.randn_like
    torch.randn, torch.randn_like = _given_noise(ranks, 7)
    try:
        infos = training.read([training.step() for _ in range(3)])
    finally:
        torch.randn, torch.randn_like = randn, randn_like
    return [gradient.numpy() for gradient in (*log, critic.mean, critic.sd)], [tuple(info) for info in infos]


def _gradient_job(rank, folder):
    warnings.simplefilter("ignore", NonFiniteWarning)
    return [_gradients(Ranks.find(), objective, cut) for objective, cut in _GRADIENT_CASES]


_GRADIENT_CASES = [(PathGradientKL(), 9.0), (PathGradientKL(), 0.5), (FisherDivergence(), 9.0)]


def test_ranks_step_along_the_gradient_of_all_their_particles(tmp_path):
    results = _launch(_gradient_job, tmp_path)
    for case, (objective, cut) in enumerate(_GRADIENT_CASES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)
            gradients, infos = _gradients(Ranks.alone(), objective, cut)
        assert (sum(info[-1] for info in infos) > 0) == (cut < 1)
        for rank in results:
            rank_gradients, rank_infos = results[rank][case]
            assert len(rank_gradients) == len(gradients)
            for got, expected in zip(rank_gradients, gradients):
                torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-9, atol=1e-11)
            assert all(got == pytest.approx(expected, rel=1e-9) for got, expected in zip(rank_infos, infos))


# --- the same posterior -------------------------------------------------------------------------------


def _posterior_job(rank, folder):
    pyro.set_rng_seed(3 + rank)  # so that the critics differ at first
    sivism = SIVISM(normal_mean, num_particles=65, critic=ScoreNetwork(2, (32, 32)))
    sivism.run(200, DATA, progress_bar=False)
    sivism.save(folder / f"saved_by_{rank}")
    return _state(sivism), sivism.sample(20_000)["mu"].tolist(), sivism.ranks.size


def test_an_ordinary_script_under_torchrun_finds_the_posterior(tmp_path):
    results = _launch(_posterior_job, tmp_path, environments=_torchrun_environments(2))
    assert results[0][0] == results[1][0], "the ranks disagree"
    assert results[0][1] != results[1][1], "the ranks draw the same noise"
    assert (tmp_path / "saved_by_0").exists()
    assert not (tmp_path / "saved_by_1").exists()
    precision = len(DATA) + 0.01
    for _, draws, size in results.values():
        assert size == 2
        errors = (torch.tensor(draws) - DATA.sum(0) / precision) * precision**0.5
        # Standard errors of 20,000 draws are .007 and .005; the rest is room for the fit itself.
        assert errors.mean(0).abs().max() < 0.1
        assert (errors.std(0) - 1.0).abs().max() < 0.1


# --- agreement ----------------------------------------------------------------------------------------


def _minibatch_job(rank, folder):
    fits = []
    for seed in (5, 5, 6):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed + 100 * rank * len(fits))  # rank 0's is what counts
        sivism = _small(minibatched)
        sivism.setup(DATA)
        pyro.set_rng_seed(seed)  # alike on all ranks; their noise must differ all the same
        with warnings.catch_warnings(record=True):
            result = sivism.run(5, DATA, progress_bar=False)
        fits.append((_state(sivism), result.losses.tolist(), sivism.target.minibatch["data"].tolist()))
    return fits


def test_minibatches_differ_by_rank_and_all_else_follows_from_the_seed(tmp_path):
    results = _launch(_minibatch_job, tmp_path, size=3)
    for fit in range(3):
        states, losses, minibatches = zip(*(results[rank][fit] for rank in range(3)))
        assert states[0] == states[1] == states[2]
        assert losses[0] == losses[1] == losses[2]
        assert len({tuple(minibatch) for minibatch in minibatches}) == 3
    for rank in range(3):
        first, again, other = results[rank]
        assert first == again
        assert first[0] != other[0]


def _following_job(rank, folder):
    """Rank 1's chains take longer than a rank waits for another's step."""
    distance_to_chains, directions = cycles.distance_to_chains, []

    def slow(*args):
        time.sleep(5.0 * rank)
        distance = distance_to_chains(*args)
        directions.append(distance.directions.tolist())
        return distance

    cycles.distance_to_chains = slow
    pyro.set_rng_seed(0)
    sivism = _small()
    sivism.ranks.timeout = 2.0
    result = sivism.run(None, DATA, progress_bar=False, callbacks=[lambda sivism, info: info.step == 5])
    return _state(sivism), result.losses.tolist(), directions


def test_ranks_follow_chains_of_their_own_and_wait_for_each_other(tmp_path):
    results = _launch(_following_job, tmp_path)
    (state, losses, directions), other = results[0], results[1]
    assert (state, losses) == other[:2]
    assert len(losses) == 5
    assert len(directions) == len(other[2]) == 1
    assert directions != other[2]


def _stop_job(rank, folder):
    pyro.set_rng_seed(0)
    sivism = _small()

    def stop_on_rank_1(sivism, info):
        return rank == 1 and info.step == 3

    result = sivism.run(10, DATA, progress_bar=False, callbacks=[stop_on_rank_1])
    return result.num_steps, result.interrupted


def test_a_callback_on_one_rank_ends_the_run_on_all(tmp_path):
    assert _launch(_stop_job, tmp_path) == {0: (3, True), 1: (3, True)}


def _warning_job(rank, folder):
    def cut(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("cut", torch.where(x[0] > 1.0, torch.nan, 1.0) * x[0])

    pyro.set_rng_seed(0)
    sivism = _small(cut, num_particles=64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = sivism.run(3, DATA, progress_bar=False)
    return [w.category.__name__ for w in caught if issubclass(w.category, NonFiniteWarning)], result.num_nonfinite


def test_only_the_first_rank_warns(tmp_path):
    results = _launch(_warning_job, tmp_path)
    assert results[0][0] == ["NonFiniteWarning"]
    assert results[1][0] == []
    assert results[0][1] == results[1][1] > 0


# --- a rank that dies ---------------------------------------------------------------------------------


def _killed_job(rank, folder):
    pyro.set_rng_seed(0)
    sivism = _small()

    def die(sivism, info):
        if rank == 1 and info.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    noticed = time.monotonic()

    def remember(sivism, info):
        nonlocal noticed
        noticed = time.monotonic()

    try:
        callbacks = [Checkpoint(folder / "fit", every=3), remember, die]
        sivism.run(1000, DATA, progress_bar=False, callbacks=callbacks)
    except DistributedError as error:
        message, seconds = str(error), time.monotonic() - noticed
    with pytest.raises(DistributedError, match="can fit no more"):
        sivism.step(DATA)
    return message, seconds


def test_a_killed_rank_ends_the_others_and_leaves_the_last_checkpoint(tmp_path):
    processes = _start(_killed_job, tmp_path, 3)
    results = _finish(processes, tmp_path, killed=[1])
    for rank in (0, 2):
        message, seconds = results[rank]
        assert seconds < 30
        assert f"rank {rank} of 3 lost rank(s) 1" in message
        assert str(tmp_path / "fit") in message
    assert not list(tmp_path.glob("*.tmp"))
    loaded = SIVISM.load(tmp_path / "fit", normal_mean, num_particles=5)
    assert loaded.num_steps_taken == 6
    assert loaded.sample(10)["mu"].isfinite().all()
    loaded.run(2, DATA, progress_bar=False)
    assert loaded.num_steps_taken == 8


def _silent_job(rank, folder):
    pyro.set_rng_seed(0)
    sivism = _small().setup(DATA)
    sivism.ranks.timeout = 0.5
    if rank == 1:
        while not (folder / "given_up").exists():
            time.sleep(0.05)
        return None
    try:
        sivism.step(DATA)
    except DistributedError as error:
        return str(error)
    finally:
        (folder / "given_up").touch()


def test_a_silent_rank_is_given_up(tmp_path):
    message = _launch(_silent_job, tmp_path)[0]
    assert "got no answer from another rank" in message
    assert "busy for 0.5 s" in message
    assert message.endswith("There is no checkpoint.")


class _Broken(_ShortWarmUp):
    """Fails on rank 1, halfway through a step."""

    def guide_loss(self, sample, step):
        if torch.distributed.get_rank() == 1:
            raise MemoryError
        return super().guide_loss(sample, step)


def _refusal_job(rank, folder):
    pyro.set_rng_seed(0)
    sivism, errors = _small(loss=_Broken()).setup(DATA), []
    sivism.ranks.timeout = 1.0
    for _ in range(2):
        try:
            sivism.step(DATA)
        except (MemoryError, DistributedError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_a_rank_that_left_a_step_half_done_does_not_join_the_next(tmp_path):
    results = _launch(_refusal_job, tmp_path)
    assert results[1][0].startswith("MemoryError")
    assert results[1][1].startswith("DistributedError: rank 1 has left an earlier step by MemoryError")
    assert [error.split(":")[0] for error in results[0]] == ["DistributedError"] * 2


def _unlucky_job(rank, folder):
    pyro.set_rng_seed(0)
    sivism = _small().setup(DATA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        result = sivism.run(2, DATA * torch.nan if rank == 1 else DATA, progress_bar=False)
    try:
        sivism.step(DATA * torch.nan)
    except NonFiniteError:
        return result.num_nonfinite, _state(sivism)


def test_a_rank_without_a_finite_particle_leaves_the_step_to_the_others(tmp_path):
    results = _launch(_unlucky_job, tmp_path)
    assert results[0] == results[1]
    num_nonfinite, state = results[0]
    assert num_nonfinite == 2 * Ranks(1, 2).share(5)
    assert all(torch.tensor(values).isfinite().all() for values in state)


# --- one process --------------------------------------------------------------------------------------


def test_one_process_is_alone_and_pays_nothing():
    ranks = Ranks.find()
    assert (ranks.rank, ranks.size, ranks.is_first, ranks.share(7)) == (0, 1, True, 7)
    tensors = [torch.ones(2), None, torch.tensor(3)]
    assert all(got is given for got, given in zip(ranks.pool(tensors, weight=5), tensors))
    assert ranks.gather(tensors[0], 2) is tensors[0]
    before = torch.get_rng_state()
    with ranks.same_random_numbers():
        ranks.draw_apart()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.distributed.is_initialized()


def test_shares_add_up_and_none_is_empty():
    assert [Ranks(rank, 3).share(8) for rank in range(3)] == [3, 3, 2]
    with pytest.raises(ArgumentError, match="at least the number of processes, 3; got 2"):
        Ranks(2, 3).share(2)


def test_ranks_of_the_wrong_kind_are_refused():
    with pytest.raises(ArgumentError, match="ranks is a int"):
        SIVISM(normal_mean, ranks=2)


# --- checkpoints --------------------------------------------------------------------------------------


def test_checkpoints_are_written_on_time(tmp_path):
    sivism, path = _small(), tmp_path / "fit"
    steps = []

    def look(sivism, info):
        steps.append(SIVISM.load(path, normal_mean).num_steps_taken if path.exists() else 0)

    sivism.run(5, DATA, progress_bar=False, callbacks=[Checkpoint(path, every=2), look])
    assert steps == [0, 2, 2, 4, 4]
    with pytest.raises(ArgumentError, match="every=0"):
        Checkpoint(path, every=0)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    sivism, path = _small().setup(DATA), tmp_path / "fit"
    sivism.save(path)
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        sivism.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["fit"]
