{{/* What the schema can't say, because it needs two values at once. */}}

{{- define "tandem.checks" -}}
{{- $values := .Values -}}
{{- range $component := list "gateway" "prefill" "decode" -}}
{{- $settings := index $values $component -}}
{{- if lt (int $settings.drainSeconds) (int $values.longestGenerationSeconds) -}}
{{- fail (printf "%s.drainSeconds is %d: a drain must outlast the longest request, longestGenerationSeconds %d" $component (int $settings.drainSeconds) (int $values.longestGenerationSeconds)) -}}
{{- end -}}
{{- if and (eq (toString $settings.rollout.maxSurge) "0") (eq (toString $settings.rollout.maxUnavailable) "0") -}}
{{- fail (printf "%s.rollout: maxSurge and maxUnavailable can't both be 0" $component) -}}
{{- end -}}
{{- if and $values.tls.enabled (not (index $values.tls.secrets $component)) -}}
{{- fail (printf "tls.secrets.%s is empty: with tls.enabled every service needs a certificate" $component) -}}
{{- end -}}
{{- end -}}
{{- range $component := list "prefill" "decode" -}}
{{- $scaling := (index $values $component).autoscaling -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "%s.autoscaling: minReplicas is above maxReplicas" $component) -}}
{{- end -}}
{{- if and (eq $scaling.mode "hpa") (not $values.monitoring.rules.enabled) -}}
{{- fail (printf "%s.autoscaling.mode hpa scales on recording rules: set monitoring.rules.enabled" $component) -}}
{{- end -}}
{{- end -}}
{{- include "tandem.checkEngine" . -}}
{{- include "tandem.checkModel" . -}}
{{- include "tandem.checkAccess" . -}}
{{- end -}}

{{/* What an engine would refuse at each pod's start, or the gateways at each request. */}}
{{- define "tandem.checkEngine" -}}
{{- $engine := .Values.engine -}}
{{- $devices := list -}}
{{- range $component := list "prefill" "decode" -}}
{{- $settings := index $.Values $component -}}
{{- if gt (int $settings.gpu.count) 1 -}}
{{- fail (printf "%s.gpu.count is %d: a worker computes on one GPU; give the pool more replicas" $component (int $settings.gpu.count)) -}}
{{- end -}}
{{- if or (ne $settings.autoscaling.mode "none") (int $settings.replicas) -}}
{{- $devices = append $devices (include "tandem.device" (dict "root" $ "settings" $settings)) -}}
{{- if and (eq $engine.attention "flash-attn-2") (ne (int $settings.blockSize) 256) -}}
{{- fail (printf "%s.blockSize is %d: engine.attention flash-attn-2 takes blocks of 256 tokens" $component (int $settings.blockSize)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if gt (len (uniq $devices)) 1 -}}
{{- fail "prefill.gpu.count and decode.gpu.count: one pool would compute on GPUs and the other on CPUs, which can't be paired" -}}
{{- end -}}
{{- range $device := uniq $devices -}}
{{- $gpu := eq $device "cuda" -}}
{{- if has $engine.compute (ternary (list "exact" "bf16") (list "native" "fp8" "int4") $gpu) -}}
{{- fail (printf "engine.compute %s is none of device %s" $engine.compute $device) -}}
{{- end -}}
{{- if and (not $gpu) (ne $engine.attention "auto") -}}
{{- fail (printf "engine.attention %s is for GPUs (gpu.count), leave it auto" $engine.attention) -}}
{{- end -}}
{{- if and (not $gpu) (or (eq $engine.dtype "float16") (eq $engine.kvDtype "float16")) -}}
{{- fail "engine.dtype and engine.kvDtype: float16 is for GPUs (gpu.count)" -}}
{{- end -}}
{{- $kvDtypes := list "auto" "int8" "fp8_e4m3" (ternary "bfloat16" $engine.dtype (eq $engine.dtype "auto")) -}}
{{- if and $gpu (not (has $engine.kvDtype $kvDtypes)) -}}
{{- fail (printf "engine.kvDtype %s: on GPUs it is int8, fp8_e4m3, or that of engine.dtype (auto)" $engine.kvDtype) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkModel" -}}
{{- with .Values.model -}}
{{- $needed := dict "hub" .hub.repository "pvc" .pvc.claimName "image" .image.reference "hostPath" .hostPath.path -}}
{{- $names := dict "hub" "hub.repository" "pvc" "pvc.claimName" "image" "image.reference" "hostPath" "hostPath.path" -}}
{{- if and (hasKey $needed .source) (not (get $needed .source)) -}}
{{- fail (printf "model.%s is empty: model.source %s needs it" (get $names .source) .source) -}}
{{- end -}}
{{- if and (eq .source "image") (semverCompare "<1.33.0-0" $.Capabilities.KubeVersion.Version) -}}
{{- fail (printf "model.source image needs Kubernetes 1.33 or later, this is %s" $.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkAccess" -}}
{{- with .Values -}}
{{- if and .tls.clientCertificates (not .tls.enabled) -}}
{{- fail "tls.clientCertificates needs tls.enabled" -}}
{{- end -}}
{{- if and .route.enabled (not .route.parentRefs) -}}
{{- fail "route.parentRefs is empty: name the Gateways that the route belongs to" -}}
{{- end -}}
{{- if and .ingress.enabled (or (not .ingress.hosts) (not (or .ingress.tlsSecret .ingress.passthrough))) -}}
{{- fail "ingress.hosts and ingress.tlsSecret are needed: gRPC through an Ingress is HTTP/2 over TLS" -}}
{{- end -}}
{{- if and .ingress.passthrough (not .tls.enabled) -}}
{{- fail "ingress.passthrough needs tls.enabled: the gateways have to end the clients' TLS" -}}
{{- end -}}
{{- if .test.enabled -}}
{{- include "tandem.checkTest" $ -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A test that can't pass is none, and one that isn't there would pass. */}}
{{- define "tandem.checkTest" -}}
{{- with .Values -}}
{{- if and .tls.clientCertificates (not .tls.testSecret) -}}
{{- fail "tls.testSecret is empty: with tls.clientCertificates helm test needs a client's certificate; or set test.enabled to false" -}}
{{- end -}}
{{- if and .apiKeys.secretName (not .apiKeys.testSecret.name) -}}
{{- fail "apiKeys.testSecret.name is empty: with apiKeys.secretName helm test needs a key; or set test.enabled to false" -}}
{{- end -}}
{{- end -}}
{{- end -}}
