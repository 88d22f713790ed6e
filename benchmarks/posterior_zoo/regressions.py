"""Regressions: raw units, heavy tails, counts, ordered outcomes, survival, sparsity."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor

from posterior_zoo.registry import generator, posterior


def _standardized(table) -> Tensor:
    columns = torch.as_tensor(table, dtype=torch.double)
    return ((columns - columns.mean(0)) / columns.std(0)).float()


@posterior()
def house_prices() -> tuple:
    """Nothing is centred or scaled: posterior sds from 20 to 30,000, all but flat priors."""
    random = generator(1)
    num_rows = 120
    area = 60.0 + 140.0 * torch.rand(num_rows, generator=random)
    rooms = (area / 30.0 + torch.randn(num_rows, generator=random)).round().clamp(1, 8)
    year = 1930.0 + (90.0 * torch.rand(num_rows, generator=random)).round()
    has_garden = torch.bernoulli(torch.full((num_rows,), 0.4), generator=random)
    price = 1500.0 * area + 12_000.0 * rooms + 800.0 * (year - 1930.0) + 35_000.0 * has_garden
    price = price + 20_000.0 + 30_000.0 * torch.randn(num_rows, generator=random)

    def model(area: Tensor, rooms: Tensor, age: Tensor, has_garden: Tensor, price: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1e6))
        per_area = pyro.sample("per_area", dist.Normal(0.0, 1e5))
        per_room = pyro.sample("per_room", dist.Normal(0.0, 1e6))
        per_year = pyro.sample("per_year", dist.Normal(0.0, 1e5))
        garden = pyro.sample("garden", dist.Normal(0.0, 1e6))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1e5))
        mean = intercept + per_area * area + per_room * rooms + per_year * age + garden * has_garden
        with pyro.plate("houses", len(price)):
            pyro.sample("price", dist.Normal(mean, sigma), obs=price)

    return model, (area, rooms, 2020.0 - year, has_garden, price), None


@posterior()
def student_t_regression() -> tuple:
    """The degrees of freedom are unknown; a tenth of the rows are outliers."""
    random = generator(2)
    covariates = torch.randn(100, 4, generator=random)
    noise = torch.randn(100, generator=random)
    noise[:10] *= 8.0
    y = 1.0 + covariates @ torch.tensor([1.5, -1.0, 0.5, 0.0]) + 0.5 * noise

    def model(covariates: Tensor, y: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
        slopes = pyro.sample("slopes", dist.Normal(0.0, 5.0).expand([4]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
        df = pyro.sample("df", dist.Gamma(2.0, 0.1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.StudentT(df, intercept + covariates @ slopes, sigma), obs=y)

    return model, (covariates, y), None


@posterior()
def zero_inflated_counts() -> tuple:
    random = generator(3)
    covariates = torch.randn(150, 3, generator=random)
    rate = (0.8 + covariates @ torch.tensor([0.5, -0.3, 0.0])).exp()
    structural_zero = torch.bernoulli(torch.full((150,), 0.3), generator=random)
    counts = (1.0 - structural_zero) * torch.poisson(rate, generator=random)

    def model(covariates: Tensor, counts: Tensor) -> None:
        gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
        slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        rate = torch.exp(intercept + covariates @ slopes)
        with pyro.plate("rows", len(counts)):
            pyro.sample("counts", dist.ZeroInflatedPoisson(rate, gate=gate), obs=counts)

    return model, (covariates, counts), None


@posterior()
def ordinal_regression() -> tuple:
    random = generator(4)
    covariates = torch.randn(200, 3, generator=random)
    uniform = torch.rand(200, generator=random)
    latent = covariates @ torch.tensor([1.0, -0.7, 0.2]) + (uniform / (1.0 - uniform)).log()
    ratings = torch.bucketize(latent, torch.tensor([-2.5, -1.0, 0.3, 2.0]))

    def model(covariates: Tensor, ratings: Tensor) -> None:
        slopes = pyro.sample("slopes", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        steps = dist.Normal(0.0, 3.0).expand([4]).to_event(1)
        cutpoints = pyro.sample("cutpoints", dist.TransformedDistribution(steps, [OrderedTransform()]))
        with pyro.plate("rows", len(ratings)):
            pyro.sample("ratings", dist.OrderedLogistic(covariates @ slopes, cutpoints), obs=ratings)

    return model, (covariates, ratings), None


@posterior()
def weibull_survival() -> tuple:
    """Times in days, a third of them censored: those enter by a factor."""
    random = generator(5)
    covariates = torch.randn(120, 3, generator=random)
    scale = (5.5 + covariates @ torch.tensor([0.4, -0.3, 0.0])).exp()
    times = scale * (-torch.rand(120, generator=random).log()) ** (1.0 / 1.4)
    censored_at = 50.0 + 600.0 * torch.rand(120, generator=random)
    observed, times = times <= censored_at, torch.minimum(times, censored_at)

    def model(covariates: Tensor, times: Tensor, observed: Tensor) -> None:
        shape = pyro.sample("shape", dist.Gamma(1.0, 1.0))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
        slopes = pyro.sample("slopes", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        scale = torch.exp(intercept + covariates @ slopes)
        died = dist.Weibull(scale[observed], shape)
        pyro.sample("times", died.to_event(1), obs=times[observed])
        pyro.factor("censored", -((times[~observed] / scale[~observed]) ** shape).sum())

    return model, (covariates, times, observed), None


@posterior(log_sites=("tau", "local"))
def horseshoe_regression() -> tuple:
    """Progression of diabetes on ten standardized columns."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    covariates, y = _standardized(bunch.data), _standardized(bunch.target)

    def model(covariates: Tensor, y: Tensor) -> None:
        num_columns = covariates.shape[1]
        tau = pyro.sample("tau", dist.HalfCauchy(0.5))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("columns", num_columns):
            local = pyro.sample("local", dist.HalfCauchy(1.0))
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(covariates @ (tau * local * raw), sigma), obs=y)

    return model, (covariates, y), None


@posterior()
def breast_cancer() -> tuple:
    """Logistic regression on thirty strongly correlated columns that separate the classes nearly."""
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    covariates, benign = _standardized(bunch.data), torch.as_tensor(bunch.target).float()

    def model(covariates: Tensor, benign: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
        weights = pyro.sample("weights", dist.Normal(torch.zeros(covariates.shape[1]), 1.0).to_event(1))
        with pyro.plate("patients", len(benign)):
            pyro.sample("benign", dist.Bernoulli(logits=intercept + covariates @ weights), obs=benign)

    return model, (covariates, benign), None


@posterior()
def wine_classes() -> tuple:
    """Multinomial regression of three classes, where only differences of the weights are in the likelihood."""
    from sklearn.datasets import load_wine

    bunch = load_wine()
    covariates, cultivars = _standardized(bunch.data), torch.as_tensor(bunch.target)

    def model(covariates: Tensor, cultivars: Tensor) -> None:
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([covariates.shape[1], 3]).to_event(2))
        with pyro.plate("wines", len(cultivars)):
            pyro.sample("cultivars", dist.Categorical(logits=covariates @ weights + bias), obs=cultivars)

    return model, (covariates, cultivars), None
