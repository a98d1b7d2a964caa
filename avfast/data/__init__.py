"""Clips in, tensors out: manifests, media decoding, log-mel filter banks, augmentation."""

from avfast.data.bad_files import BadFiles, TooManyBadFiles
from avfast.data.clip_list import Clip, ClipList
from avfast.data.clips import (
    Batch,
    ClipDataset,
    Failure,
    StepBatches,
    collate,
    eval_loader,
    make_loader,
)
from avfast.data.csv_lists import MediaFiles
from avfast.data.frontend import AudioMAEFrontend, HTKFrontend, KaldiFrontend, MAViLFrontend
from avfast.data.frontend_clips import ClipsFrontend
from avfast.data.log_mel import htk_log_mel, log_mel
from avfast.data.manifest import read_all, read_folder, read_manifest
from avfast.data.media import MediaError, MediaFile, MediaInfo, probe, read_audio, read_frames
from avfast.data.spec import ClipSpec, Frames

__all__ = [
    "AudioMAEFrontend",
    "BadFiles",
    "Batch",
    "Clip",
    "ClipDataset",
    "ClipList",
    "ClipSpec",
    "ClipsFrontend",
    "Failure",
    "Frames",
    "HTKFrontend",
    "KaldiFrontend",
    "MAViLFrontend",
    "MediaError",
    "MediaFile",
    "MediaFiles",
    "MediaInfo",
    "StepBatches",
    "TooManyBadFiles",
    "collate",
    "eval_loader",
    "htk_log_mel",
    "log_mel",
    "make_loader",
    "probe",
    "read_all",
    "read_audio",
    "read_folder",
    "read_frames",
    "read_manifest",
]
