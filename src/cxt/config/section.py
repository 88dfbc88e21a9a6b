"""A section of the configuration: a pydantic model that reports all problems at once."""

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cxt.config.problems import explain, explain_settings, refuse
from cxt.errors import BadRequest


class Section(BaseModel):
    """Keys of the configuration that belong together, each with its type and bounds, default, and description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    only_given: ClassVar[bool] = False
    """Whether keys that are not given are left out of a resolved configuration, because their defaults come from elsewhere."""

    @classmethod
    def read(cls, values: Any, *, at: str = "", problem: str = "not a valid request:") -> Self:
        """Check the values of this section from a file or a command line.

        Parameters
        ----------
        values : the mapping that was read; text that spells a number is converted
        at : its place in messages, such as `--spec`
        problem : first line of the message

        Raises
        ------
        BadRequest
            Naming all unknown keys (with the nearest valid ones), missing keys and wrong values.
        """
        try:
            return cls.model_validate(values, context={"from_file": True})
        except ValidationError as error:
            raise BadRequest("\n  ".join([problem, *explain(cls, error, values, at)])) from None

    def resolved(self) -> dict[str, Any]:
        """The section as JSON-able mappings, with all defaults; optional keys that are not given are left out."""
        return {
            name: _resolved(value)
            for name, value in self
            if value is not None and (name in self.model_fields_set or not self.only_given)
        }


class Settings(Section):
    """Settings of a network or a run. Wrong values raise BadRequest, which names all of them."""

    if not TYPE_CHECKING:  # type checkers know the keyword arguments

        def __init__(self, **values):
            try:
                super().__init__(**values)
            except ValidationError as error:
                refuse(explain_settings(type(self), error, values))

    def replace(self, **changes) -> Self:
        """A checked copy with *changes*."""
        return type(self)(**(dict(self) | changes))


def _resolved(value):
    if isinstance(value, Section):
        return value.resolved()
    if isinstance(value, dict):
        return {key: _resolved(child) for key, child in value.items()}
    return [_resolved(child) for child in value] if isinstance(value, list) else value
