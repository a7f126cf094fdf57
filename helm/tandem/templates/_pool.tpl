{{/*
One pool of workers, prefill or decode: Deployment, headless Service, PodDisruptionBudget, and at most one scaler.
Takes (dict "root" . "component" "prefill" or "decode" "settings" its values).
*/}}

{{- define "tandem.pool" -}}
{{- $name := include "tandem.name" . }}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "tandem.labels" . | nindent 4 }}
spec:
{{- if eq .settings.autoscaling.mode "none" }}
  replicas: {{ .settings.replicas }}
{{- end }}
  {{- include "tandem.rollout" . | nindent 2 }}
  selector:
    matchLabels: {{- include "tandem.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "tandem.labels" . | nindent 8 }}
        {{- with .settings.podLabels }}{{ toYaml . | nindent 8 }}{{ end }}
      {{- with .settings.podAnnotations }}
      annotations: {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "tandem.name" (dict "root" .root "component" "worker") }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ include "tandem.grace" .settings }}
      securityContext: {{- include "tandem.podSecurity" .root | nindent 8 }}
      {{- include "tandem.placement" . | trim | nindent 6 }}
      containers:
        - {{ include "tandem.worker" . | indent 10 | trim }}
      volumes:
        {{- include "tandem.volumes" (merge (dict "cacheSize" .settings.cacheSize) .) | trim | nindent 8 }}
        - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .settings.shmSize }}}}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "tandem.labels" . | nindent 4 }}
spec:
  clusterIP: None
  selector: {{- include "tandem.selector" . | nindent 4 }}
  ports:
    - {name: grpc, port: 7001, targetPort: grpc, appProtocol: {{ ternary "https" "kubernetes.io/h2c" .root.Values.tls.enabled }}}
{{- include "tandem.pdb" . }}
{{- include "tandem.scaler" . }}
{{- end -}}

{{/* A worker's container. */}}
{{- define "tandem.worker" -}}
name: {{ .component }}
image: {{ include "tandem.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [python, -m, {{ .component }}_service]
args:
  - --model={{ include "tandem.model" .root }}
  - --listen={{ .root.Values.bindAddress }}:7001
  - --health={{ .root.Values.bindAddress }}:7002
  - --metrics={{ .root.Values.bindAddress }}:9401
  - --device={{ include "tandem.device" . }}
  - --compute={{ .root.Values.engine.compute }}
  - --dtype={{ .root.Values.engine.dtype }}
  - --attention={{ .root.Values.engine.attention }}
  - --kv-dtype={{ .root.Values.engine.kvDtype }}
  {{- with .root.Values.engine.transport }}
  - --transport={{ . }}
  {{- end }}
  {{- range $flag, $value := dict "block-size" .settings.blockSize "kv-memory" .settings.kvMemory "chunk-size" .settings.chunkSize "max-sequences" .settings.maxSequences "threads" .settings.threads }}
  {{- if $value }}
  - --{{ $flag }}={{ $value | int64 }}
  {{- end }}
  {{- end }}
  - --drain-grace={{ .settings.drainSeconds | int }}
  {{- with include "tandem.tlsArgs" . | trim }}{{ . | nindent 2 }}{{ end }}
  {{- range .settings.extraArgs }}
  - {{ . | quote }}
  {{- end }}
env:
  {{- include "tandem.env" . | nindent 2 }}
ports:
  - {name: grpc, containerPort: 7001}
  - {name: health, containerPort: 7002}
  - {name: metrics, containerPort: 9401}
{{ include "tandem.lifecycle" (dict "settings" .settings "port" 7002 "startup" "") }}
resources: {{- include "tandem.resources" .settings | trim | nindent 2 }}
securityContext: {{- include "tandem.containerSecurity" . | nindent 2 }}
volumeMounts:
  {{- include "tandem.mounts" . | trim | nindent 2 }}
  - {name: shm, mountPath: /dev/shm}
{{- end -}}

{{/*
What a worker computes on. Never left to the worker: one that was given a GPU and can't use it must not serve from the
CPU, and on nodes that show GPUs to every pod one without must keep off them. Takes (dict "root" . "settings" ...).
*/}}
{{- define "tandem.device" -}}
{{- $asked := .root.Values.engine.device -}}
{{- ternary (ternary "cuda" "cpu" (gt (int .settings.gpu.count) 0)) $asked (eq $asked "auto") -}}
{{- end -}}

{{/* Devices are requested and limited alike, as device plugins want it. */}}
{{- define "tandem.resources" -}}
{{- $devices := dict }}
{{- range list .gpu .rdma }}
{{- if .count }}{{ $_ := set $devices .resource (int .count) }}{{ end }}
{{- end }}
{{- range $kind := list "requests" "limits" }}
{{ $kind }}: {{- toYaml (merge (dict) $devices (index $.resources $kind | default dict)) | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "tandem.pdb" -}}
{{- if .settings.podDisruptionBudget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "tandem.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "tandem.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .settings.podDisruptionBudget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{- include "tandem.selector" . | nindent 6 }}
{{- end }}
{{- end -}}
