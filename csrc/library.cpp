// The schemas of all functions, nothing else. The Python side checks and documents the arguments.
#include "native.h"

PATCHLIGHT_LIBRARY(m) {
  m.def(
      "adamw_fwd(Tensor table, Tensor blocks, Tensor(a!) steps, Tensor scale, Tensor lr, Tensor weight_decay, Tensor momentum, "
      "Tensor freeze, Tensor refused, float beta1, float beta2, float eps, ScalarType gradient, ScalarType copy) -> ()");
  m.def("block_masks_fwd(Tensor first, Tensor counts, int seed, int views, int height, int width, bool blocks) -> Tensor");
  m.def("class_attention_fwd(Tensor q, Tensor k_self, Tensor v_self, Tensor k_patches, Tensor v_patches, Tensor? index) -> (Tensor, Tensor)");
  m.def("class_attention_bwd(Tensor grad, Tensor q, Tensor k_self, Tensor v_self, Tensor k_patches, Tensor v_patches, Tensor? index, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("neighbor_topk_fwd(Tensor x, int height, int width, int k, int radius, bool wrap, bool scores) -> (Tensor, Tensor)");
  m.def("photometric_fwd(Tensor pixels, Tensor table, float[] mean, float[] std, ScalarType dtype) -> Tensor");
  m.def(
      "prototype_ce_fwd(Tensor z, Tensor prototypes, Tensor teacher_z, Tensor teacher_prototypes, float temperature, "
      "float teacher_temperature, Tensor pair_weight, Tensor row_weight, Tensor? bias, bool gradients) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "prototype_ce_tiles(Tensor z, Tensor? prototypes, Tensor teacher_z, Tensor? teacher_prototypes, float temperature, "
      "float teacher_temperature, Tensor? teacher_divisor, Tensor? units, Tensor? bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "prototype_ce_merge(Tensor student, Tensor teacher, Tensor expected, Tensor pair_weight, Tensor row_weight) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "prototype_ce_grad_logits(Tensor z, Tensor? prototypes, Tensor teacher_z, Tensor? teacher_prototypes, "
      "float temperature, float teacher_temperature, Tensor? teacher_divisor, Tensor? units, Tensor? bias, "
      "Tensor pair_weight, Tensor row_weight, Tensor log2_student, Tensor log2_teacher, Tensor unit, ScalarType dtype) "
      "-> Tensor");
  m.def(
      "prototype_ce_whole_rows(Tensor dots, Tensor teacher_dots, float temperature, float teacher_temperature, "
      "Tensor? teacher_divisor, Tensor? units, Tensor? bias, Tensor pair_weight, Tensor row_weight, Tensor unit, "
      "int first, Tensor(a!) losses, Tensor(b!) log2_student, Tensor(c!) log2_teacher, Tensor(d!)? gradient) -> ()");
  m.def("query_attention_fwd(Tensor qkv, int raw, int crop) -> (Tensor, Tensor)");
  m.def("query_attention_bwd(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int raw, int crop) -> Tensor");
  m.def(
      "self_relation_fwd(Tensor student, Tensor teacher, float student_scale, float teacher_scale, Tensor weight, "
      "bool gradients) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "self_relation_bwd(Tensor student, Tensor teacher, float student_scale, float teacher_scale, Tensor weight, "
      "Tensor log2_student, Tensor log2_teacher, Tensor grad_loss, bool exact) -> Tensor");
  m.def("square_sums_fwd(Tensor table, Tensor blocks, ScalarType dtype) -> Tensor");
}
