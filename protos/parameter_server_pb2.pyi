from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    APPLIED: _ClassVar[Outcome]
    STALE: _ClassVar[Outcome]
    NOT_FINITE: _ClassVar[Outcome]
    FENCED: _ClassVar[Outcome]
    ACCUMULATED: _ClassVar[Outcome]
FLOAT32: DType
BFLOAT16: DType
OUTCOME_UNSPECIFIED: Outcome
APPLIED: Outcome
STALE: Outcome
NOT_FINITE: Outcome
FENCED: Outcome
ACCUMULATED: Outcome

class PullRequest(_message.Message):
    __slots__ = ("at_least", "wait_s", "dtype", "worker")
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    at_least: int
    wait_s: float
    dtype: DType
    worker: int
    def __init__(self, at_least: _Optional[int] = ..., wait_s: _Optional[float] = ..., dtype: _Optional[_Union[DType, str]] = ..., worker: _Optional[int] = ...) -> None: ...

class PullHeader(_message.Message):
    __slots__ = ("version", "num_parameters", "num_statistics", "not_yet", "dtype", "newest_pushes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    NUM_STATISTICS_FIELD_NUMBER: _ClassVar[int]
    NOT_YET_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NEWEST_PUSHES_FIELD_NUMBER: _ClassVar[int]
    version: int
    num_parameters: int
    num_statistics: int
    not_yet: bool
    dtype: DType
    newest_pushes: NewestPushes
    def __init__(self, version: _Optional[int] = ..., num_parameters: _Optional[int] = ..., num_statistics: _Optional[int] = ..., not_yet: bool = ..., dtype: _Optional[_Union[DType, str]] = ..., newest_pushes: _Optional[_Union[NewestPushes, _Mapping]] = ...) -> None: ...

class NewestPushes(_message.Message):
    __slots__ = ("workers", "incarnations", "sequences")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedScalarFieldContainer[int]
    incarnations: _containers.RepeatedScalarFieldContainer[int]
    sequences: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, workers: _Optional[_Iterable[int]] = ..., incarnations: _Optional[_Iterable[int]] = ..., sequences: _Optional[_Iterable[int]] = ...) -> None: ...

class PushHeader(_message.Message):
    __slots__ = ("worker", "incarnation", "sequence", "pulled_version", "num_samples", "num_parameters", "num_statistics", "dtype", "order")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PULLED_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    NUM_STATISTICS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    worker: int
    incarnation: int
    sequence: int
    pulled_version: int
    num_samples: int
    num_parameters: int
    num_statistics: int
    dtype: DType
    order: Order
    def __init__(self, worker: _Optional[int] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., pulled_version: _Optional[int] = ..., num_samples: _Optional[int] = ..., num_parameters: _Optional[int] = ..., num_statistics: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., order: _Optional[_Union[Order, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("outcome", "version", "staleness", "lr", "checksum")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    version: int
    staleness: int
    lr: float
    checksum: int
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., version: _Optional[int] = ..., staleness: _Optional[int] = ..., lr: _Optional[float] = ..., checksum: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Clocks(_message.Message):
    __slots__ = ("updates", "samples")
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    updates: int
    samples: int
    def __init__(self, updates: _Optional[int] = ..., samples: _Optional[int] = ...) -> None: ...

class WorkerClock(_message.Message):
    __slots__ = ("worker", "last_sequences")
    class LastSequencesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    worker: int
    last_sequences: _containers.ScalarMap[int, int]
    def __init__(self, worker: _Optional[int] = ..., last_sequences: _Optional[_Mapping[int, int]] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("clocks", "workers", "num_buffers", "pushes", "apply_s", "num_uncompensated", "unauthenticated", "queue_s", "gate_s", "num_pins", "replica")
    class PushesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CLOCKS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUM_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    APPLY_S_FIELD_NUMBER: _ClassVar[int]
    NUM_UNCOMPENSATED_FIELD_NUMBER: _ClassVar[int]
    UNAUTHENTICATED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    GATE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PINS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    clocks: Clocks
    workers: _containers.RepeatedCompositeFieldContainer[WorkerClock]
    num_buffers: int
    pushes: _containers.ScalarMap[str, int]
    apply_s: float
    num_uncompensated: int
    unauthenticated: int
    queue_s: float
    gate_s: float
    num_pins: int
    replica: ReplicaStatus
    def __init__(self, clocks: _Optional[_Union[Clocks, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerClock, _Mapping]]] = ..., num_buffers: _Optional[int] = ..., pushes: _Optional[_Mapping[str, int]] = ..., apply_s: _Optional[float] = ..., num_uncompensated: _Optional[int] = ..., unauthenticated: _Optional[int] = ..., queue_s: _Optional[float] = ..., gate_s: _Optional[float] = ..., num_pins: _Optional[int] = ..., replica: _Optional[_Union[ReplicaStatus, _Mapping]] = ...) -> None: ...

class FenceRequest(_message.Message):
    __slots__ = ("worker", "incarnation")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker: int
    incarnation: int
    def __init__(self, worker: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class FenceReply(_message.Message):
    __slots__ = ("clock",)
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    clock: WorkerClock
    def __init__(self, clock: _Optional[_Union[WorkerClock, _Mapping]] = ...) -> None: ...

class CutRequest(_message.Message):
    __slots__ = ("name", "version", "wait_s", "vectors")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    wait_s: float
    vectors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., wait_s: _Optional[float] = ..., vectors: _Optional[_Iterable[str]] = ...) -> None: ...

class ExpectRequest(_message.Message):
    __slots__ = ("workers", "number")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedScalarFieldContainer[int]
    number: int
    def __init__(self, workers: _Optional[_Iterable[int]] = ..., number: _Optional[int] = ...) -> None: ...

class ExpectReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EnterRequest(_message.Message):
    __slots__ = ("worker", "incarnation", "clock")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    worker: int
    incarnation: int
    clock: int
    def __init__(self, worker: _Optional[int] = ..., incarnation: _Optional[int] = ..., clock: _Optional[int] = ...) -> None: ...

class EnterReply(_message.Message):
    __slots__ = ("clock",)
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    clock: int
    def __init__(self, clock: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Vector(_message.Message):
    __slots__ = ("name", "numel")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUMEL_FIELD_NUMBER: _ClassVar[int]
    name: str
    numel: int
    def __init__(self, name: _Optional[str] = ..., numel: _Optional[int] = ...) -> None: ...

class StateHeader(_message.Message):
    __slots__ = ("clocks", "vectors", "workers")
    CLOCKS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    clocks: Clocks
    vectors: _containers.RepeatedCompositeFieldContainer[Vector]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerClock]
    def __init__(self, clocks: _Optional[_Union[Clocks, _Mapping]] = ..., vectors: _Optional[_Iterable[_Union[Vector, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerClock, _Mapping]]] = ...) -> None: ...

class OpenLaneRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenLaneReply(_message.Message):
    __slots__ = ("ticket", "tcp_port", "shm_socket")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TCP_PORT_FIELD_NUMBER: _ClassVar[int]
    SHM_SOCKET_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    tcp_port: int
    shm_socket: str
    def __init__(self, ticket: _Optional[bytes] = ..., tcp_port: _Optional[int] = ..., shm_socket: _Optional[str] = ...) -> None: ...

class LaneCall(_message.Message):
    __slots__ = ("timeout_s", "pull", "push", "released", "memory")
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    pull: PullRequest
    push: PushHeader
    released: bool
    memory: Memory
    def __init__(self, timeout_s: _Optional[float] = ..., pull: _Optional[_Union[PullRequest, _Mapping]] = ..., push: _Optional[_Union[PushHeader, _Mapping]] = ..., released: bool = ..., memory: _Optional[_Union[Memory, _Mapping]] = ...) -> None: ...

class LaneAnswer(_message.Message):
    __slots__ = ("welcome", "pull", "receipt", "refusal", "memory")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    pull: PullHeader
    receipt: Receipt
    refusal: Refusal
    memory: Memory
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., pull: _Optional[_Union[PullHeader, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("num_parameters", "num_statistics")
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    NUM_STATISTICS_FIELD_NUMBER: _ClassVar[int]
    num_parameters: int
    num_statistics: int
    def __init__(self, num_parameters: _Optional[int] = ..., num_statistics: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("status", "reason")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    status: str
    reason: str
    def __init__(self, status: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("segment", "offset_num_bytes")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    segment: int
    offset_num_bytes: int
    def __init__(self, segment: _Optional[int] = ..., offset_num_bytes: _Optional[int] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("places", "new_segments")
    PLACES_FIELD_NUMBER: _ClassVar[int]
    NEW_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    places: _containers.RepeatedCompositeFieldContainer[Place]
    new_segments: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, places: _Optional[_Iterable[_Union[Place, _Mapping]]] = ..., new_segments: _Optional[_Iterable[int]] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("epoch", "index")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    index: int
    def __init__(self, epoch: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("order", "fence", "expect", "enter", "complete")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    EXPECT_FIELD_NUMBER: _ClassVar[int]
    ENTER_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    order: Order
    fence: FenceRequest
    expect: ExpectRequest
    enter: EnterRequest
    complete: bool
    def __init__(self, order: _Optional[_Union[Order, _Mapping]] = ..., fence: _Optional[_Union[FenceRequest, _Mapping]] = ..., expect: _Optional[_Union[ExpectRequest, _Mapping]] = ..., enter: _Optional[_Union[EnterRequest, _Mapping]] = ..., complete: bool = ...) -> None: ...

class OperationReply(_message.Message):
    __slots__ = ("checksum",)
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    checksum: int
    def __init__(self, checksum: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("epoch", "address")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    address: str
    def __init__(self, epoch: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EpochRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class EpochReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("epoch", "state", "num_behind", "waiting_s", "error", "waited_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_BEHIND_FIELD_NUMBER: _ClassVar[int]
    WAITING_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    state: str
    num_behind: int
    waiting_s: float
    error: str
    waited_s: float
    def __init__(self, epoch: _Optional[int] = ..., state: _Optional[str] = ..., num_behind: _Optional[int] = ..., waiting_s: _Optional[float] = ..., error: _Optional[str] = ..., waited_s: _Optional[float] = ...) -> None: ...

class KeptReceipt(_message.Message):
    __slots__ = ("sequence", "receipt")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    receipt: Receipt
    def __init__(self, sequence: _Optional[int] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class WorkerImage(_message.Message):
    __slots__ = ("worker", "incarnation", "last_sequences", "receipts")
    class LastSequencesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    incarnation: int
    last_sequences: _containers.ScalarMap[int, int]
    receipts: _containers.RepeatedCompositeFieldContainer[KeptReceipt]
    def __init__(self, worker: _Optional[int] = ..., incarnation: _Optional[int] = ..., last_sequences: _Optional[_Mapping[int, int]] = ..., receipts: _Optional[_Iterable[_Union[KeptReceipt, _Mapping]]] = ...) -> None: ...

class GatheredPush(_message.Message):
    __slots__ = ("worker", "incarnation", "sequence", "held_num_samples")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HELD_NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    worker: int
    incarnation: int
    sequence: int
    held_num_samples: int
    def __init__(self, worker: _Optional[int] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., held_num_samples: _Optional[int] = ...) -> None: ...

class ImageVector(_message.Message):
    __slots__ = ("name", "numel", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUMEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    numel: int
    dtype: DType
    def __init__(self, name: _Optional[str] = ..., numel: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class ImageHeader(_message.Message):
    __slots__ = ("order", "clocks", "workers", "at_work", "gathered", "num_summed", "num_gathered_samples", "worker_clocks", "floor", "marked_clock", "marked_version", "num_expected", "settled", "vectors", "newest_pushes", "marked_pushes")
    class WorkerClocksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    class SettledEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ORDER_FIELD_NUMBER: _ClassVar[int]
    CLOCKS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    AT_WORK_FIELD_NUMBER: _ClassVar[int]
    GATHERED_FIELD_NUMBER: _ClassVar[int]
    NUM_SUMMED_FIELD_NUMBER: _ClassVar[int]
    NUM_GATHERED_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    WORKER_CLOCKS_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    MARKED_CLOCK_FIELD_NUMBER: _ClassVar[int]
    MARKED_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPECTED_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_PUSHES_FIELD_NUMBER: _ClassVar[int]
    MARKED_PUSHES_FIELD_NUMBER: _ClassVar[int]
    order: Order
    clocks: Clocks
    workers: _containers.RepeatedCompositeFieldContainer[WorkerImage]
    at_work: _containers.RepeatedScalarFieldContainer[int]
    gathered: _containers.RepeatedCompositeFieldContainer[GatheredPush]
    num_summed: int
    num_gathered_samples: int
    worker_clocks: _containers.ScalarMap[int, int]
    floor: int
    marked_clock: int
    marked_version: int
    num_expected: int
    settled: _containers.ScalarMap[str, int]
    vectors: _containers.RepeatedCompositeFieldContainer[ImageVector]
    newest_pushes: NewestPushes
    marked_pushes: NewestPushes
    def __init__(self, order: _Optional[_Union[Order, _Mapping]] = ..., clocks: _Optional[_Union[Clocks, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerImage, _Mapping]]] = ..., at_work: _Optional[_Iterable[int]] = ..., gathered: _Optional[_Iterable[_Union[GatheredPush, _Mapping]]] = ..., num_summed: _Optional[int] = ..., num_gathered_samples: _Optional[int] = ..., worker_clocks: _Optional[_Mapping[int, int]] = ..., floor: _Optional[int] = ..., marked_clock: _Optional[int] = ..., marked_version: _Optional[int] = ..., num_expected: _Optional[int] = ..., settled: _Optional[_Mapping[str, int]] = ..., vectors: _Optional[_Iterable[_Union[ImageVector, _Mapping]]] = ..., newest_pushes: _Optional[_Union[NewestPushes, _Mapping]] = ..., marked_pushes: _Optional[_Union[NewestPushes, _Mapping]] = ...) -> None: ...
