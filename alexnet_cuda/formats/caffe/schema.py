"""The messages of Caffe's files, for the protobuf library.

Names and numbers of the fields are those of github.com/BVLC/caffe, src/caffe/proto/caffe.proto; `raw_data` and a few
fields of NetParameter are those of github.com/NVIDIA/caffe. Fields that only the solver reads are left out.
"""

from typing import Any

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ModuleNotFoundError as error:
    remedy = "`pip install 'alexnet_cuda[caffe]'` installs it"
    raise ModuleNotFoundError(f"Caffe's files need protobuf, which is not installed; {remedy}") from error

PACKAGE = "alexnet_cuda.caffe"

# Name -> values, numbered from 0 where no number is given.
ENUMS = {
    "Phase": "TRAIN TEST",
    "Type": "DOUBLE FLOAT FLOAT16 INT UINT BOOL",
    "VarianceNorm": "FAN_IN FAN_OUT AVERAGE",
    "DimCheckMode": "STRICT PERMISSIVE",
    "NormalizationMode": "FULL VALID BATCH_SIZE NONE",
    "Engine": "DEFAULT CAFFE CUDNN",
    "DB": "LEVELDB LMDB",
    "EltwiseOp": "PROD SUM MAX",
    "NormRegion": "ACROSS_CHANNELS WITHIN_CHANNEL",
    "PoolMethod": "MAX AVE STOCHASTIC",
    "RoundMode": "CEIL FLOOR",
    "Norm": "L1=1 L2=2",
    "ReductionOp": "SUM=1 ASUM=2 SUMSQ=3 MEAN=4",
}

# V1LayerParameter.LayerType: value, number, and the type that it became.
V1_TYPES = """
ABSVAL 35 AbsVal, ACCURACY 1 Accuracy, ARGMAX 30 ArgMax, BNLL 2 BNLL, CONCAT 3 Concat, CONTRASTIVE_LOSS 37
ContrastiveLoss, CONVOLUTION 4 Convolution, DATA 5 Data, DECONVOLUTION 39 Deconvolution, DROPOUT 6 Dropout, DUMMY_DATA
32 DummyData, EUCLIDEAN_LOSS 7 EuclideanLoss, ELTWISE 25 Eltwise, EXP 38 Exp, FLATTEN 8 Flatten, HDF5_DATA 9 HDF5Data,
HDF5_OUTPUT 10 HDF5Output, HINGE_LOSS 28 HingeLoss, IM2COL 11 Im2col, IMAGE_DATA 12 ImageData, INFOGAIN_LOSS 13
InfogainLoss, INNER_PRODUCT 14 InnerProduct, LRN 15 LRN, MEMORY_DATA 29 MemoryData, MULTINOMIAL_LOGISTIC_LOSS 16
MultinomialLogisticLoss, MVN 34 MVN, POOLING 17 Pooling, POWER 26 Power, RELU 18 ReLU, SIGMOID 19 Sigmoid,
SIGMOID_CROSS_ENTROPY_LOSS 27 SigmoidCrossEntropyLoss, SILENCE 36 Silence, SOFTMAX 20 Softmax, SOFTMAX_LOSS 21
SoftmaxWithLoss, SPLIT 22 Split, SLICE 33 Slice, TANH 23 TanH, WINDOW_DATA 24 WindowData, THRESHOLD 31 Threshold
"""
V1_TYPE = {name: type_ for name, _, type_ in (entry.split() for entry in V1_TYPES.split(","))}
ENUMS["LayerType"] = " ".join(f"{name}={n}" for name, n, _ in (entry.split() for entry in V1_TYPES.split(",")))

_TRANSFORM = "2 scale float=1, 3 mean_file, 5 crop_size uint32, 6 mirror bool"
_PATH = "1 source"
# Name -> its fields, each "number name type=default": a string if no type is given; "*" marks repeated fields.
MESSAGES = {
    "BlobShape": "1 dim int64*",
    "BlobProto": """7 shape BlobShape, 5 data float*, 6 diff float*, 8 double_data double*, 9 double_diff double*,
        10 raw_data_type Type, 11 raw_diff_type Type, 12 raw_data bytes, 13 raw_diff bytes,
        1 num int64, 2 channels int64, 3 height int64, 4 width int64""",
    "FillerParameter": """1 type string=constant, 2 value float, 3 min float, 4 max float=1, 5 mean float,
        6 std float=1, 7 sparse int64=-1, 8 variance_norm VarianceNorm""",
    "NetParameter": """1 name, 3 input string*, 8 input_shape BlobShape*, 4 input_dim int64*, 5 force_backward bool,
        6 state NetState, 7 debug_info bool, 100 layer LayerParameter*, 2 layers V1LayerParameter*,
        11 default_forward_type Type, 12 default_backward_type Type, 13 default_forward_math Type,
        14 default_backward_math Type, 15 global_grad_scale float, 16 global_grad_scale_adaptive bool,
        17 default_conv_algos_override, 18 reduce_buckets int32, 19 default_cudnn_math_override int32,
        20 eltwise_mem_sharing bool""",
    "NetState": "1 phase Phase=TEST, 2 level int64, 3 stage string*",
    "NetStateRule": "1 phase Phase, 2 min_level int64, 3 max_level int64, 4 stage string*, 5 not_stage string*",
    "ParamSpec": "1 name, 2 share_mode DimCheckMode, 3 lr_mult float=1, 4 decay_mult float=1",
    "TransformationParameter": """1 scale float=1, 2 mirror bool, 3 crop_size uint32, 4 mean_file,
        5 mean_value float*, 6 force_color bool, 7 force_gray bool""",
    "LossParameter": "1 ignore_label int32, 3 normalization NormalizationMode=VALID, 2 normalize bool",
    "AccuracyParameter": "1 top_k uint32=1, 2 axis int32=1, 3 ignore_label int32",
    "ArgMaxParameter": "1 out_max_val bool, 2 top_k uint32=1, 3 axis int32",
    "BatchNormParameter": """1 use_global_stats bool, 2 moving_average_fraction float=.999, 3 eps float=1e-5,
        5 scale_filler FillerParameter, 6 bias_filler FillerParameter, 7 scale_bias bool, 15 engine Engine""",
    "BiasParameter": "1 axis int32=1, 2 num_axes int32=1, 3 filler FillerParameter",
    "ClipParameter": "1 min float, 2 max float",
    "ConcatParameter": "2 axis int32=1, 1 concat_dim uint32=1",
    "ContrastiveLossParameter": "1 margin float=1, 2 legacy_version bool",
    "ConvolutionParameter": """1 num_output uint32, 2 bias_term bool=true, 3 pad uint32*, 4 kernel_size uint32*,
        6 stride uint32*, 18 dilation uint32*, 9 pad_h uint32, 10 pad_w uint32, 11 kernel_h uint32, 12 kernel_w uint32,
        13 stride_h uint32, 14 stride_w uint32, 5 group uint32=1, 7 weight_filler FillerParameter,
        8 bias_filler FillerParameter, 15 engine Engine, 16 axis int32=1, 17 force_nd_im2col bool""",
    "CropParameter": "1 axis int32=2, 2 offset uint32*",
    "DataParameter": f"""{_PATH}, 4 batch_size uint32, 7 rand_skip uint32, 8 backend DB, {_TRANSFORM},
        9 force_encoded_color bool, 10 prefetch uint32""",
    "DropoutParameter": "1 dropout_ratio float=0.5",
    "DummyDataParameter": """1 data_filler FillerParameter*, 6 shape BlobShape*, 2 num uint32*, 3 channels uint32*,
        4 height uint32*, 5 width uint32*""",
    "EltwiseParameter": "1 operation EltwiseOp=SUM, 2 coeff float*, 3 stable_prod_grad bool=true",
    "ELUParameter": "1 alpha float=1",
    "ExpParameter": "1 base float=-1, 2 scale float=1, 3 shift float",
    "FlattenParameter": "1 axis int32=1, 2 end_axis int32=-1",
    "HDF5DataParameter": f"{_PATH}, 2 batch_size uint32, 3 shuffle bool",
    "HDF5OutputParameter": "1 file_name",
    "HingeLossParameter": "1 norm Norm",
    "ImageDataParameter": f"""{_PATH}, 4 batch_size uint32=1, 7 rand_skip uint32, 8 shuffle bool, 9 new_height uint32,
        10 new_width uint32, 11 is_color bool=true, 12 root_folder, {_TRANSFORM}""",
    "InfogainLossParameter": f"{_PATH}, 2 axis int32=1",
    "InnerProductParameter": """1 num_output uint32, 2 bias_term bool=true, 3 weight_filler FillerParameter,
        4 bias_filler FillerParameter, 5 axis int32=1, 6 transpose bool""",
    "InputParameter": "1 shape BlobShape*",
    "LogParameter": "1 base float=-1, 2 scale float=1, 3 shift float",
    "LRNParameter": """1 local_size uint32=5, 2 alpha float=1, 3 beta float=0.75, 4 norm_region NormRegion, 5 k float=1,
        6 engine Engine""",
    "MemoryDataParameter": "1 batch_size uint32, 2 channels uint32, 3 height uint32, 4 width uint32",
    "MVNParameter": "1 normalize_variance bool=true, 2 across_channels bool, 3 eps float=1e-9",
    "PoolingParameter": """1 pool PoolMethod, 4 pad uint32, 9 pad_h uint32, 10 pad_w uint32, 2 kernel_size uint32,
        5 kernel_h uint32, 6 kernel_w uint32, 3 stride uint32=1, 7 stride_h uint32, 8 stride_w uint32, 11 engine Engine,
        12 global_pooling bool, 13 round_mode RoundMode""",
    "PowerParameter": "1 power float=1, 2 scale float=1, 3 shift float",
    "PReLUParameter": "1 filler FillerParameter, 2 channel_shared bool",
    "ReductionParameter": "1 operation ReductionOp=SUM, 2 axis int32, 3 coeff float=1",
    "ReLUParameter": "1 negative_slope float, 2 engine Engine",
    "ReshapeParameter": "1 shape BlobShape, 2 axis int32, 3 num_axes int32=-1",
    "ScaleParameter": """1 axis int32=1, 2 num_axes int32=1, 3 filler FillerParameter, 4 bias_term bool,
        5 bias_filler FillerParameter""",
    "SigmoidParameter": "1 engine Engine",
    "SliceParameter": "3 axis int32=1, 2 slice_point uint32*, 1 slice_dim uint32=1",
    "SoftmaxParameter": "1 engine Engine, 2 axis int32=1",
    "SwishParameter": "1 beta float=1",
    "TanHParameter": "1 engine Engine",
    "ThresholdParameter": "1 threshold float",
    "TileParameter": "1 axis int32=1, 2 tiles int32",
    "WindowDataParameter": f"""{_PATH}, 4 batch_size uint32, 7 fg_threshold float, 8 bg_threshold float,
        9 fg_fraction float, 10 context_pad uint32, 11 crop_mode, 12 cache_images bool, 13 root_folder, {_TRANSFORM}""",
    "LayerParameter": """1 name, 2 type, 3 bottom string*, 4 top string*, 10 phase Phase, 5 loss_weight float*,
        6 param ParamSpec*, 7 blobs BlobProto*, 11 propagate_down bool*, 8 include NetStateRule*,
        9 exclude NetStateRule*, 100 transform_param TransformationParameter, 101 loss_param LossParameter,
        102 accuracy_param AccuracyParameter, 103 argmax_param ArgMaxParameter, 139 batch_norm_param BatchNormParameter,
        141 bias_param BiasParameter, 148 clip_param ClipParameter, 104 concat_param ConcatParameter,
        105 contrastive_loss_param ContrastiveLossParameter, 106 convolution_param ConvolutionParameter,
        144 crop_param CropParameter, 107 data_param DataParameter, 108 dropout_param DropoutParameter,
        109 dummy_data_param DummyDataParameter, 110 eltwise_param EltwiseParameter, 140 elu_param ELUParameter,
        111 exp_param ExpParameter, 135 flatten_param FlattenParameter, 112 hdf5_data_param HDF5DataParameter,
        113 hdf5_output_param HDF5OutputParameter, 114 hinge_loss_param HingeLossParameter,
        115 image_data_param ImageDataParameter, 116 infogain_loss_param InfogainLossParameter,
        117 inner_product_param InnerProductParameter, 143 input_param InputParameter, 134 log_param LogParameter,
        118 lrn_param LRNParameter, 119 memory_data_param MemoryDataParameter, 120 mvn_param MVNParameter,
        121 pooling_param PoolingParameter, 122 power_param PowerParameter, 131 prelu_param PReLUParameter,
        136 reduction_param ReductionParameter, 123 relu_param ReLUParameter, 133 reshape_param ReshapeParameter,
        142 scale_param ScaleParameter, 124 sigmoid_param SigmoidParameter, 125 softmax_param SoftmaxParameter,
        126 slice_param SliceParameter, 147 swish_param SwishParameter, 127 tanh_param TanHParameter,
        128 threshold_param ThresholdParameter, 138 tile_param TileParameter,
        129 window_data_param WindowDataParameter""",
    "V1LayerParameter": """2 bottom string*, 3 top string*, 4 name, 32 include NetStateRule*, 33 exclude NetStateRule*,
        5 type LayerType, 6 blobs BlobProto*, 1001 param string*, 1002 blob_share_mode DimCheckMode*, 7 blobs_lr float*,
        8 weight_decay float*, 35 loss_weight float*, 27 accuracy_param AccuracyParameter,
        23 argmax_param ArgMaxParameter, 9 concat_param ConcatParameter,
        40 contrastive_loss_param ContrastiveLossParameter, 10 convolution_param ConvolutionParameter,
        11 data_param DataParameter, 12 dropout_param DropoutParameter, 26 dummy_data_param DummyDataParameter,
        24 eltwise_param EltwiseParameter, 41 exp_param ExpParameter, 13 hdf5_data_param HDF5DataParameter,
        14 hdf5_output_param HDF5OutputParameter, 29 hinge_loss_param HingeLossParameter,
        15 image_data_param ImageDataParameter, 16 infogain_loss_param InfogainLossParameter,
        17 inner_product_param InnerProductParameter, 18 lrn_param LRNParameter,
        22 memory_data_param MemoryDataParameter, 34 mvn_param MVNParameter, 19 pooling_param PoolingParameter,
        21 power_param PowerParameter, 30 relu_param ReLUParameter, 38 sigmoid_param SigmoidParameter,
        39 softmax_param SoftmaxParameter, 31 slice_param SliceParameter, 37 tanh_param TanHParameter,
        25 threshold_param ThresholdParameter, 20 window_data_param WindowDataParameter,
        36 transform_param TransformationParameter, 42 loss_param LossParameter, 1 layer V0LayerParameter""",
    "V0LayerParameter": """1 name, 2 type, 3 num_output uint32, 4 biasterm bool=true, 5 weight_filler FillerParameter,
        6 bias_filler FillerParameter, 7 pad uint32, 8 kernelsize uint32, 9 group uint32=1, 10 stride uint32=1,
        11 pool PoolMethod, 12 dropout_ratio float=0.5, 13 local_size uint32=5, 14 alpha float=1, 15 beta float=0.75,
        22 k float=1, 16 source, 17 scale float=1, 18 meanfile, 19 batchsize uint32, 20 cropsize uint32, 21 mirror bool,
        50 blobs BlobProto*, 51 blobs_lr float*, 52 weight_decay float*, 53 rand_skip uint32,
        54 det_fg_threshold float, 55 det_bg_threshold float, 56 det_fg_fraction float, 58 det_context_pad uint32,
        59 det_crop_mode, 60 new_num int32, 61 new_channels int32, 62 new_height int32, 63 new_width int32,
        64 shuffle_images bool, 65 concat_dim uint32=1, 1001 hdf5_output_param HDF5OutputParameter""",
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="alexnet_cuda_caffe.proto", package=PACKAGE, syntax="proto2")
    field_type: Any = descriptor_pb2.FieldDescriptorProto
    for name, values in ENUMS.items():
        # An enum's values share one namespace with the enum itself, so each lives in a message of its own.
        enum = file.message_type.add(name=f"{name}s").enum_type.add(name=name)
        for index, entry in enumerate(values.split()):
            value, _, number = entry.partition("=")
            enum.value.add(name=value, number=int(number or index))
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for entry in fields.split(","):
            number, field_name, kind = (*entry.split(), "string")[:3]
            kind, _, default = kind.partition("=")
            field = message.field.add(name=field_name, number=int(number), label=3 if kind.endswith("*") else 1)
            kind = kind.rstrip("*")
            if kind in ENUMS:
                field.type, field.type_name = field_type.TYPE_ENUM, f".{PACKAGE}.{kind}s.{kind}"
            elif kind in MESSAGES:
                field.type, field.type_name = field_type.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                field.type = getattr(field_type, f"TYPE_{kind.upper()}")
                field.options.packed = field.label == 3 and kind != "string"
            if default:
                field.default_value = default
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())


def message(name: str) -> Any:
    """The class of a message."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


NetParameter, LayerParameter, BlobProto = message("NetParameter"), message("LayerParameter"), message("BlobProto")
