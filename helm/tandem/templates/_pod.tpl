{{/* What every pod has. Ports: gRPC 50051 (gateway) or 7001 (workers), health in clear one higher, metrics 9401. */}}

{{/* The restricted pod security standard. */}}
{{- define "tandem.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.runAsUser | int64 }}
runAsGroup: {{ .Values.runAsUser | int64 }}
fsGroup: {{ .Values.runAsUser | int64 }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "tandem.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Where a pod may run. Takes (dict "root" . "component" ... "settings" ...). */}}
{{- define "tandem.placement" -}}
{{- with .settings.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.topologySpreadConstraints }}
topologySpreadConstraints:
{{- range . }}
  - {{ toYaml . | indent 4 | trim }}
    labelSelector:
      matchLabels: {{- include "tandem.selector" $ | nindent 8 }}
{{- end }}
{{- end }}
{{- with .settings.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .settings.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/*
Probes and the end. Startup waits for the model; readiness is "takes new requests"; liveness is "the process and its
engine turn", which stays true while a worker drains or a gateway has no worker. Takes (dict "settings" ... "port" ...).
*/}}
{{- define "tandem.lifecycle" -}}
startupProbe:
  grpc: {port: {{ .port }}, service: {{ .startup | quote }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ divf .settings.startupSeconds 5 | ceil | int }}
readinessProbe:
  grpc: {port: {{ .port }}, service: ""}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  grpc: {port: {{ .port }}, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
lifecycle:
  preStop:
    exec: {command: [sleep, {{ .settings.preStopSeconds | int | quote }}]}
{{- end -}}

{{/* Seconds from the pod's deletion to the kill: preStop, drain, and a margin for what a process does at its end. */}}
{{- define "tandem.grace" -}}
{{ add .preStopSeconds .drainSeconds 15 }}
{{- end -}}

{{/*
How pods are replaced. A pod may wait for the end of the one that has its GPU, and a gateway for the workers' models, so
a rollout is stuck only after all of that. Takes (dict "root" . "settings" ...).
*/}}
{{- define "tandem.rollout" -}}
revisionHistoryLimit: 5
progressDeadlineSeconds: {{ add (include "tandem.slowestStart" .root) (include "tandem.grace" .settings) 600 }}
strategy:
  type: RollingUpdate
  rollingUpdate: {{- toYaml .settings.rollout | nindent 4 }}
{{- end -}}

{{/* Seconds after which every pod of the release may be expected to serve. */}}
{{- define "tandem.slowestStart" -}}
{{- with .Values }}{{ max (int .gateway.startupSeconds) (int .prefill.startupSeconds) (int .decode.startupSeconds) }}{{ end -}}
{{- end -}}

{{/* Takes (dict "root" . "component" ...). */}}
{{- define "tandem.tlsArgs" -}}
{{- if .root.Values.tls.enabled }}
- --tls-cert=/tls/tls.crt
- --tls-key=/tls/tls.key
- --tls-ca=/tls/ca.crt
{{- end }}
{{- end -}}

{{- define "tandem.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- if not (has .root.Values.model.source (list "builtin" "hub")) }}
- {name: model, mountPath: /model, readOnly: true}
{{- end }}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* Takes (dict "root" . "component" ... "cacheSize" ...). */}}
{{- define "tandem.volumes" -}}
- {name: tmp, emptyDir: {sizeLimit: 1Gi}}
- {name: cache, emptyDir: {sizeLimit: {{ .cacheSize }}}}
{{- with .root.Values.model }}
{{- if eq .source "pvc" }}
- name: model
  persistentVolumeClaim: {claimName: {{ .pvc.claimName }}, readOnly: true}
{{- else if eq .source "image" }}
- name: model
  image: {reference: {{ .image.reference | quote }}, pullPolicy: {{ .image.pullPolicy }}}
{{- else if eq .source "hostPath" }}
- name: model
  hostPath: {path: {{ .hostPath.path | quote }}, type: Directory}
{{- end }}
{{- end }}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ index .root.Values.tls.secrets .component }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{/* --model of all three services. */}}
{{- define "tandem.model" -}}
{{- with .Values.model -}}
{{- if eq .source "builtin" -}}
default
{{- else if eq .source "hub" -}}
hub:{{ .hub.repository }}
{{- else -}}
{{ printf "/model/%s" .path | trimSuffix "/" }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.env" -}}
- {name: HOME, value: /cache}
- {name: TANDEM_CACHE_DIR, value: /cache/tandem}
{{- with .root.Values.model }}
{{- if eq .source "hub" }}
- {name: HF_HOME, value: /cache/hub}
{{- if .hub.tokenSecret.name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .hub.tokenSecret.name }}, key: {{ .hub.tokenSecret.key }}}
{{- end }}
{{- end }}
{{- end }}
{{- with .settings.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}
