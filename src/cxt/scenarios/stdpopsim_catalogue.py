"""Species, demographic models and chromosomes of stdpopsim's catalogue."""

import functools

from cxt.errors import BadRequest, suggest_nearest

ANCIENT_MODELS = ("AncientEurasia_9K19", "PapuansOutOfAfrica_10J19", "AncientEurope_4A21")
"""Catalogue models built around ancient samples, excluded from the published training set."""


SEX_CHROMOSOMES = {"AnoCar": ("LGb",), "GasAcu": ("19",), "HelMel": ("21",)}
"""Sex chromosomes that are not recognisable by name: X of the anole, X of the stickleback, Z of the butterfly."""


@functools.cache
def import_stdpopsim():
    """The module stdpopsim, imported when it is first needed, because that takes a second and other scenarios do not use it."""
    import stdpopsim

    return stdpopsim


def get_species(spec: dict):
    """The stdpopsim species of a scenario; BadRequest with the nearest name if there is none."""
    stdpopsim = import_stdpopsim()
    species_ids = [species.id for species in stdpopsim.all_species()]
    if spec["species"] not in species_ids:
        raise BadRequest(
            f"scenario '{spec['name']}': unknown species '{spec['species']}'{suggest_nearest(spec['species'], species_ids)}"
        )
    return stdpopsim.get_species(spec["species"])


def list_sampled_populations(model) -> list[str]:
    """Names of the populations of a catalogue model that can be sampled at time 0."""
    return [p.name for p in model.populations if p.allow_samples and not p.default_sampling_time]


def select_models(spec: dict) -> list[str]:
    """Catalogue models from which a stdpopsim scenario draws; empty for a constant size.

    Raises
    ------
    BadRequest
        If stdpopsim has no such species or model, or a model has no population that can be sampled at time 0.
    """
    species = get_species(spec)
    catalogue_models = [model.id for model in species.demographic_models]
    for model in spec.get("models", []):
        if model not in catalogue_models:
            raise BadRequest(
                f"scenario '{spec['name']}': {species.id} has no model '{model}'{suggest_nearest(model, catalogue_models)}"
            )
    if catalogue_models and spec.get("models") != [] and "population_size" in spec:
        raise BadRequest(
            f"scenario '{spec['name']}': population_size is for a constant size, but {species.id} has catalogue models; "
            "add `models: []` to use the size, or remove population_size"
        )
    selected = spec.get("models", [model for model in catalogue_models if model not in ANCIENT_MODELS])
    for model in selected:
        if not list_sampled_populations(build_catalogue_model(species.id, model)):
            raise BadRequest(f"scenario '{spec['name']}': no population of '{model}' can be sampled at time 0")
    return list(selected)


@functools.cache
def build_catalogue_model(species: str, model: str):
    """A catalogue model, cached in the process, because building one takes longer than a short simulation."""
    return import_stdpopsim().get_species(species).get_demographic_model(model)


def list_autosomes(spec: dict) -> list:
    """Diploid nuclear chromosomes, except sex chromosomes, that are at least as long as the scenario's sequence."""
    species = get_species(spec)
    sex = ("X", "Y", "Z", "W", *SEX_CHROMOSOMES.get(species.id, ()))
    usable = [c for c in species.genome.chromosomes if c.ploidy == 2 and c.id.upper() not in map(str.upper, sex)]
    if not usable:
        raise BadRequest(f"scenario '{spec['name']}': {species.id} has no diploid chromosome, which cxt needs")
    long_enough = [chromosome for chromosome in usable if chromosome.length >= spec["sequence_length"]]
    if not long_enough:
        longest = max((chromosome.length for chromosome in usable), default=0)
        raise BadRequest(
            f"scenario '{spec['name']}': no autosome of {species.id} is as long as sequence_length {spec['sequence_length']}; "
            f"the longest has {longest:.0f} bp"
        )
    return long_enough


def describe_other_recombination(spec: dict) -> str:
    """A note on the scenario's models that were inferred with other recombination rates than its own; "" if there are none."""
    inferred = {name: build_catalogue_model(spec["species"], name).recombination_rate for name in select_models(spec)}
    if "genetic_map" in spec:
        source, scenario_rates = f"the genetic map {spec['genetic_map']}", []
    else:
        source, scenario_rates = "the chromosomes", [chromosome.recombination_rate for chromosome in list_autosomes(spec)]
    differing_models = {name: rate for name, rate in inferred.items() if rate is not None and set(scenario_rates) != {rate}}
    if not differing_models:
        return ""
    rates_text = (
        f" ({' to '.join(f'{rate:.3g}' for rate in sorted({min(scenario_rates), max(scenario_rates)}))} per bp and generation)"
        if scenario_rates
        else ""
    )
    return (
        f"scenario '{spec['name']}' recombines at the rates of {source}{rates_text}, but these catalogue models were inferred "
        "with different rates: " + ", ".join(f"{name} {rate:.3g}" for name, rate in differing_models.items())
    )
