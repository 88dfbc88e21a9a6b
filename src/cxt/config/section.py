"""A section of the configuration: a pydantic model whose problems are told all at once."""

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cxt.config.problems import explain, explain_settings, refuse
from cxt.errors import BadRequest


class Section(BaseModel):
    """Keys of the configuration that belong together, each with its type and bounds, default, and description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    only_given: ClassVar[bool] = False
    """The defaults are another section's: keys that are not given are left out of a resolved configuration."""

    @classmethod
    def read(cls, values: Any, *, at: str = "", problem: str = "not a valid request:") -> Self:
        """Check what a file or a command line gives for this section.

        Parameters
        ----------
        values : the mapping that was read; text that says a number is taken as the number
        at : where it stands, for messages, such as `--spec`
        problem : first line of the message

        Raises
        ------
        BadRequest
            Names every unknown key (with the nearest valid one), missing key and wrong value at once.
        """
        try:
            return cls.model_validate(values, context={"from_file": True})
        except ValidationError as error:
            raise BadRequest("\n  ".join([problem, *explain(cls, error, values, at)])) from None

    def resolved(self) -> dict[str, Any]:
        """The section as JSON-able mappings, with every default; optional keys that are not given are left out."""
        return {
            name: _resolved(value)
            for name, value in self
            if value is not None and (name in self.model_fields_set or not self.only_given)
        }


class Settings(Section):
    """What a network or a run is made with. A wrong value raises BadRequest, which names all that are wrong."""

    if not TYPE_CHECKING:  # which knows the keywords

        def __init__(self, **values):
            try:
                super().__init__(**values)
            except ValidationError as error:
                refuse(explain_settings(type(self), error, values))

    def replace(self, **changes) -> Self:
        """A copy with *changes*, checked."""
        return type(self)(**(dict(self) | changes))


def _resolved(value):
    if isinstance(value, Section):
        return value.resolved()
    if isinstance(value, dict):
        return {key: _resolved(child) for key, child in value.items()}
    return [_resolved(child) for child in value] if isinstance(value, list) else value
