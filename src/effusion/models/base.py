"""The one face that networks have to loading, saving and placement: ModelMixin."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..core import log, publish, registry
from ..core.config import ConfigMixin
from ..core.errors import CheckpointError
from ..nn.checkpointing import GradientCheckpointingMixin
from ..nn.kernels import KernelSwitches
from ..placement import packing as packs
from ..placement.casting import compute_dtype
from ..placement.policies import execution_device
from ..placement.switches import MemorySwitches
from ..placement.upcasting import computing_in
from ..weights import original_config, recognise, saving, single_file
from ..weights.entries import Checkpoint
from ..weights.prepare import LoadOptions, Prepared

logger = log.get_logger(__name__)
Self = TypeVar("Self", bound="ModelMixin")


class ModelMixin(
    MemorySwitches, KernelSwitches, GradientCheckpointingMixin, nn.Module, ConfigMixin, publish.PushToHubMixin
):
    """Base class of all networks: an ``nn.Module`` with a configuration that can be loaded and saved.

    Class attributes that a network may set:
        _keep_in_fp32_modules: parts of module paths whose weights stay float32 in half precision.
        _keys_to_ignore_on_load_unexpected: patterns (``fnmatch``) of names in files that mean nothing.
        _legacy_keys: old parts of weight names -> what they are called now.
        _key_prefixes: prefixes of all weight names that files may have or lack.
        _repeated_blocks: class names of the blocks that :meth:`compile_repeated_blocks` compiles.
        _no_split_modules: class names of modules that stay on one device.
    """

    config_name = "config.json"
    _weights_stem: ClassVar[str] = "diffusion_pytorch_model"
    _key_prefixes: ClassVar[tuple[str, ...]] = ()
    _keep_in_fp32_modules: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = None
    _legacy_keys: ClassVar[Mapping[str, str]] = {}
    _repeated_blocks: ClassVar[list[str]] = []
    _no_split_modules: ClassVar[list[str] | None] = None
    _skip_layerwise_casting_patterns: ClassVar[list[str] | None] = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is computed with: that of the first parameter that is not kept in float32 on purpose."""
        if (compute := compute_dtype(self) or packs.compute_dtype(self)) is not None:
            return compute
        keep = set(self._keep_in_fp32_modules or ())
        floats = [(n, p.dtype) for n, p in self.named_parameters() if p.is_floating_point()]
        free = (d for n, d in floats if not keep & set(n.split(".")))
        return next(free, floats[0][1] if floats else torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Where the network computes, wherever its weights rest."""
        return execution_device(self)

    def __getattr__(self, name: str) -> Any:
        """Modules and parameters, then the configuration: ``model.sample_size`` is ``model.config.sample_size``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            config = self.__dict__.get("_internal_dict", {})
            if name in config and not name.startswith("_"):
                return config[name]
            raise

    def computing_in(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Within it the network computes in ``dtype``, and its weights rest as they are: ``with vae.computing_in(…):``."""
        return computing_in(self, dtype)

    # -- loading ---------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Self], pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any
    ) -> Any:
        """Load a network saved with :meth:`save_pretrained`, from a folder or a hub repository.

        Its parameters are the mapped file until something writes to them (then a private copy of the
        page), so loading takes milliseconds and memory is used as weights are read.

        Args:
            subfolder, revision, cache_dir, token, local_files_only, force_download: where it is.
            variant: ``"fp16"`` loads ``diffusion_pytorch_model.fp16.safetensors``.
            torch_dtype, dtype: what the floating-point weights become; float32 if not given, ``"auto"``: as stored.
            use_safetensors: ``True`` safetensors only, ``False`` torch files only, ``None`` safetensors first.
            low_cpu_mem_usage: accepted; memory is never more than the weights and one tensor.
            device_map: ``"auto"``, a device, or a dictionary of parts to devices, ``"cpu"``, ``"disk"``;
                with ``max_memory`` and ``offload_folder``, see :meth:`apply_device_map`.
            ignore_mismatched_sizes: initialise weights anew whose shape differs from the file's.
            output_loading_info: return ``(model, info)``.
            disable_mmap: read the files instead of mapping them.
            kwargs: anything else replaces an entry of the configuration.

        Raises:
            CheckpointError: a file is missing, broken, or does not fit; every key is listed.
        """
        places = {name: kwargs.pop(name, None) for name in ("device_map", "max_memory", "offload_folder")}
        options = LoadOptions.take(kwargs)
        prepared = cls._prepare(pretrained_model_name_or_path, options, **kwargs)
        model = prepared.build()
        if places["device_map"] is not None:
            model.apply_device_map(**places)
        return (model, prepared.match.as_info()) if options.output_loading_info else model

    @classmethod
    def _prepare(cls: type[Self], path: Any, options: LoadOptions, **config_changes: Any) -> Prepared[Self]:
        """Find, open and check everything, building the network without weights; reads headers only."""
        if path is None:
            raise ValueError(f"{cls.__name__}.from_pretrained needs a folder or the name of a repository")
        config, commit = cls.load_config(path, return_commit_hash=True, **options.where)
        where = {**options.where, "revision": commit} if commit else options.where
        cls._check_class(config, path)
        checkpoint = options.open(path, (cls._weights_stem,), where)
        return Prepared.of(cls, config, checkpoint, options, config_changes, str(path))

    @classmethod
    def from_single_file(cls: type[Self], pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Any:
        """Load this network out of a file in its original layout, alone or among others; or in ours.

        Args:
            pretrained_model_link_or_path_or_dict: a file, a link to one on the hub, or a dictionary of tensors.
            config: a folder, repository or dictionary with the configuration (``subfolder`` as usual); read off the
                shapes of the tensors if not given.
            original_config: a YAML file, a link to one, or a dictionary, as Stable Diffusion's first programs have them:
                numbers of heads and scales are taken from it; the rest is told by the shapes.
            quantization_config: a ``GGUFQuantizationConfig``: what the file has packed (GGUF, or eight-bit floats with
                scales) stays packed in memory, and is unpacked layer by layer into its ``compute_dtype``.
            kwargs: as for :meth:`from_pretrained`; anything else replaces an entry of the configuration.

        Raises:
            CheckpointError: the file holds no such network (says what it is), or its weights do not fit.
        """
        source = kwargs.pop("pretrained_model_link_or_path", pretrained_model_link_or_path_or_dict)
        given, device = kwargs.pop("config", None), kwargs.pop("device", None)
        if device is not None:
            kwargs["device_map"] = device
        packed = kwargs.pop("quantization_config", None)
        if packed is not None and getattr(packed, "quant_method", None) != "gguf":
            raise ValueError("`quantization_config`: single files take a GGUFQuantizationConfig only")
        if packed is not None:  # what it says is what is computed in, as with the peer; the rest follows
            kwargs["dtype"] = packed.compute_dtype
            kwargs.pop("torch_dtype", None)
        options = replace(LoadOptions.take(kwargs), packed=packed is not None)
        local = bool(options.where.get("local_files_only"))
        original = original_config.entries(kwargs.pop("original_config", None), local)
        changes = {**original.get(cls.__name__, {}), **kwargs}
        checkpoint = single_file.open_source(source, options.use_safetensors is not True, **options.where)
        return cls._prepare_single(checkpoint, given, options, **changes).build()

    def _unpack_in_calls(self, codecs: Mapping[str, Any]) -> None:
        """Parameters that were loaded as bytes, each with its codec and the dtype to compute in."""
        packs.unpack_in_calls(self, codecs)

    def dequantize(self) -> Any:
        """Unpack packed weights for good, into the dtype they are computed in; returns the network."""
        packs.unpack(self)
        return self

    @classmethod
    def _prepare_single(cls, checkpoint: Checkpoint, given: Any, options: LoadOptions, **changes: Any) -> Prepared[Any]:
        """What :meth:`_prepare` does, for a file that holds this network in any layout."""
        part = recognise.part_for(checkpoint, cls.__name__, configured=given is not None)
        if isinstance(given, Mapping):
            config: Mapping[str, Any] = given
        elif given is not None:
            config = cls.load_config(given, **options.where)
        elif part.config:
            config = part.configuration(checkpoint, changes)
        else:
            raise ValueError(f"{checkpoint.label} carries no configuration of {cls.__name__}: give `config=`")
        return Prepared.of(cls, config, part.read(checkpoint), options, changes, checkpoint.label)

    def save_single_file(self, path: str | os.PathLike[str], packing: str | None = None, **metadata: str) -> None:
        """Write the weights into one file in the original layout of this network: GGUF if ``path`` ends so.

        Args:
            packing: for GGUF, what the weights of linear layers are packed as: ``"Q8_0"``, ``"Q5_1"``, ``"Q5_0"``,
                ``"Q4_1"`` or ``"Q4_0"``; ``None`` leaves them. Weights that rest packed are written as they are.
            metadata: for safetensors, texts that its header carries.

        Raises:
            ValueError: the network has no such layout, or can't be packed so.
        """
        if Path(path).suffix == ".gguf":
            single_file.write_gguf(path, self, packing, functools.partial(packs.codec_of, self))
            return
        if packing is not None:
            raise ValueError(f"packing={packing!r} goes into files that end in .gguf, not into {path}")
        self._state_to_save()  # refuses packed weights
        single_file.write_single(path, single_file.original_state(self), metadata)

    @classmethod
    def _check_class(cls, config: Mapping[str, Any], path: Any) -> None:
        saved = config.get("_class_name")
        if not isinstance(saved, str) or saved in {c.__name__ for c in (*cls.__mro__, *cls._get_compatibles())}:
            return
        module = registry.public_names().get(saved, "")
        if module.startswith("effusion.models.") and not issubclass(registry.find_class("diffusers", saved), cls):
            raise CheckpointError(f"{path}: {cls.config_name} is that of a {saved}, not of a {cls.__name__}")

    # -- saving ----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write configuration and weights into a folder, which :meth:`from_pretrained` and the peer read.

        Everything is written aside first and moved into place when complete, so a folder never holds
        half a save. Old shards of the same variant are removed.
        """
        saving.parse_size(max_shard_size)
        if not is_main_process:
            return
        folder = Path(save_directory)
        with saving.staged(folder) as aside:
            self.save_config(aside)
            written = saving.save_weights(
                aside,
                self._state_to_save(),
                stem=self._weights_stem,
                variant=variant,
                max_shard_size=max_shard_size,
                safe_serialization=safe_serialization,
                save_function=save_function,
            )
        saving.remove_stale(folder, written, self._weights_stem, variant)
        if push_to_hub:
            publish.upload(self, folder, **kwargs)

    def _state_to_save(self) -> dict[str, torch.Tensor]:
        """What a save writes, under the names that files have."""
        if packs.compute_dtype(self) is not None:
            raise ValueError(
                f"the weights of this {type(self).__name__} rest packed: `save_single_file('….gguf')` writes them as they "
                "are, or unpack them first with `dequantize()`"
            )
        return self.state_dict()

    # -- size and speed ------------------------------------------------------------------------

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; optionally only those that need gradients, or without embedding tables."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        return sum(
            p.numel() for p in self.parameters() if (p.requires_grad or not only_trainable) and id(p) not in tables
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers unless ``return_buffers`` is false."""
        buffers = sum(b.nbytes for b in self.buffers()) if return_buffers else 0
        return sum(p.nbytes for p in self.parameters()) + buffers

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` every block that repeats (``_repeated_blocks``): compiled once, used many times.

        Raises:
            ValueError: this network names no repeated blocks, or has none of them.
        """
        blocks = [m for m in self.modules() if type(m).__name__ in self._repeated_blocks]
        if not blocks:
            raise ValueError(f"{type(self).__name__} has no blocks of the classes {list(self._repeated_blocks)}")
        for block in blocks:
            block.compile(*args, **kwargs)
