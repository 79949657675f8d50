"""``object-add``, ``object-del`` and the ``qom-*`` commands."""

from __future__ import annotations

from typing import Any

from qsd.actors import qom
from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.qapi.schema.objects import (
    ObjectDelArgs,
    ObjectOptions,
    ObjectPropertiesValues,
    ObjectPropertyInfo,
    ObjectPropertyValue,
    ObjectTypeInfo,
    QomGetArgs,
    QomListArgs,
    QomListGetArgs,
    QomListPropertiesArgs,
    QomListTypesArgs,
    QomSetArgs,
)


@command("object-add")
async def object_add(context: Context, args: ObjectOptions) -> None:
    """Make an object."""
    await context.services.objects.add(args)


@command("object-del")
async def object_del(context: Context, args: ObjectDelArgs) -> None:
    """Delete an object; a monitor cannot delete itself."""
    session = context.session.name if context.session is not None else None
    await context.services.objects.delete(args.id, session)


@command("qom-list")
async def qom_list(context: Context, args: QomListArgs) -> list[ObjectPropertyInfo]:
    """Names and types of an object's properties and children."""
    item = qom.resolve(context.services.objects.root, args.path)
    return [ObjectPropertyInfo(name=name, type=kind) for name, kind in qom.list_properties(item)]


@command("qom-get")
async def qom_get(context: Context, args: QomGetArgs) -> Any:
    """The value of one property."""
    root = context.services.objects.root
    return qom.get_property(root, qom.resolve(root, args.path, tells_ambiguity=False), args.property)


@command("qom-set")
async def qom_set(context: Context, args: QomSetArgs) -> None:
    """Set one property."""
    item = qom.resolve(context.services.objects.root, args.path, tells_ambiguity=False)
    qom.set_property(item, args.property, args.value)


@command("qom-list-get")
async def qom_list_get(context: Context, args: QomListGetArgs) -> list[ObjectPropertiesValues]:
    """All properties, with their values, of several objects; one unknown path fails the whole command."""
    root = context.services.objects.root
    items = [qom.resolve(root, path) for path in args.paths]
    return [
        ObjectPropertiesValues(
            properties=tuple(
                ObjectPropertyValue(name=name, type=kind, value=qom.get_property(root, item, name))
                for name, kind in qom.list_properties(item)
            )
        )
        for item in items
    ]


@command("qom-list-types")
async def qom_list_types(_context: Context, args: QomListTypesArgs) -> list[ObjectTypeInfo]:
    """The types that exist here, those of ``implements`` only when it is given."""
    rows = qom.list_types(args.implements, include_abstract=bool(args.abstract))
    return [ObjectTypeInfo(name=row.name, abstract=row.abstract or None, parent=row.parent) for row in rows]


@command("qom-list-properties")
async def qom_list_properties(_context: Context, args: QomListPropertiesArgs) -> list[ObjectPropertyInfo]:
    """Names and types of the properties objects of a type have."""
    return [ObjectPropertyInfo(name=row.name, type=row.kind) for row in qom.type_properties(args.typename)]
