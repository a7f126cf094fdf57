{{/*
What a pool scales on. The queries are named in files/queries.yaml; `@...@` in them are filled in here, so that each is
pinned to its namespace, release and role.
*/}}

{{- define "tandem.fill" -}}
{{- $values := .root.Values -}}
{{- .text
  | replace "NAMESPACE" .root.Release.Namespace
  | replace "RELEASE" .root.Release.Name
  | replace "TTFT_LIMIT" (include "tandem.bucket" $values.monitoring.rules.ttftLimitSeconds)
  | replace "ITL_LIMIT" (include "tandem.bucket" $values.monitoring.rules.itlLimitSeconds)
  | replace "ROLES" (ternary "decode" "prefill|decode" (and (eq $values.prefill.autoscaling.mode "none") (eq (int $values.prefill.replicas) 0)))
  | replace "GOOD_SHARE" (toString $values.monitoring.rules.goodShare)
-}}
{{- end -}}

{{/* A histogram's bucket as Prometheus labels it: 2.5, and 1.0 for 1. */}}
{{- define "tandem.bucket" -}}
{{- $text := toString . -}}
{{- ternary $text (printf "%s.0" $text) (contains "." $text) -}}
{{- end -}}

{{/* (dict "query" ... "target" ... "type" ...) of a role, as JSON: AverageValue is shared by the pods, Value is a ratio. */}}
{{- define "tandem.signals" -}}
{{- $queries := .root.Files.Get "files/queries.yaml" | fromYaml -}}
{{- $signals := list -}}
{{- range get $queries .component -}}
{{- $target := get (get $.root.Values.scaling $.component) .target -}}
{{- $query := include "tandem.fill" (dict "root" $.root "text" (.query | replace "TARGET" (toString $target))) -}}
{{- $signals = append $signals (dict "name" .name "query" $query "target" (toString $target) "type" .type) -}}
{{- end -}}
{{- toJson $signals -}}
{{- end -}}

{{- define "tandem.scaler" -}}
{{- if ne .settings.autoscaling.mode "none" }}
---
{{- include (printf "tandem.%s" .settings.autoscaling.mode) . }}
{{- end }}
{{- end -}}

{{/* One pod up in `upSeconds`, one down in `downSeconds`. */}}
{{- define "tandem.pace" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - {type: Pods, value: 1, periodSeconds: {{ .upSeconds | int }}}
scaleDown:
  stabilizationWindowSeconds: {{ .stabilizationSeconds | int }}
  policies:
    - {type: Pods, value: 1, periodSeconds: {{ .downSeconds | int }}}
{{- end -}}

{{/* External metrics: the recording rules, which an adapter serves by their names. */}}
{{- define "tandem.hpa" }}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "tandem.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "tandem.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ include "tandem.name" . }}}
  minReplicas: {{ .settings.autoscaling.minReplicas }}
  maxReplicas: {{ .settings.autoscaling.maxReplicas }}
  metrics:
    {{- range include "tandem.signals" . | fromJsonArray }}
    - type: External
      external:
        metric:
          name: tandem_{{ .name }}
          selector:
            matchLabels: {release: {{ $.root.Release.Name }}, role: {{ $.component }}}
        target: {type: {{ .type }}, {{ ternary "averageValue" "value" (eq .type "AverageValue") }}: {{ .target | quote }}}
    {{- end }}
  behavior: {{- include "tandem.pace" .root.Values.scaling | nindent 4 }}
{{- end -}}

{{- define "tandem.keda" }}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ include "tandem.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "tandem.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ include "tandem.name" . }}}
  minReplicaCount: {{ .settings.autoscaling.minReplicas }}
  maxReplicaCount: {{ .settings.autoscaling.maxReplicas }}
  pollingInterval: {{ .root.Values.scaling.keda.pollingSeconds | int }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior: {{- include "tandem.pace" .root.Values.scaling | nindent 8 }}
  triggers:
    {{- range include "tandem.signals" . | fromJsonArray }}
    - type: prometheus
      name: {{ .name | replace "_" "-" }}
      metricType: {{ .type }}
      metadata:
        serverAddress: {{ $.root.Values.scaling.keda.serverAddress | quote }}
        query: {{ .query | quote }}
        threshold: {{ .target | quote }}
      {{- with $.root.Values.scaling.keda.authenticationRef }}
      authenticationRef: {name: {{ . }}}
      {{- end }}
    {{- end }}
{{- end -}}
