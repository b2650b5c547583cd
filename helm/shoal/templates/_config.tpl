{{/* The file that `shoal serve --config` reads: the values' config, plus what the chart knows. */}}
{{- define "shoal.config" -}}
{{- $v := .Values -}}
{{- if and (not (empty $v.model.volume)) (not $v.model.path) -}}
{{- fail (printf "model.volume is set but model.path is empty: name the checkpoint's directory under model.mountPath %q" $v.model.mountPath) -}}
{{- end -}}
{{- $cell := merge (dict
      "attention_replicas" (mul $v.attention.replicas $v.attention.ranksPerPod)
      "expert_shards" (mul $v.expert.replicas $v.expert.ranksPerPod)) $v.config.cell -}}
{{- $config := dict "cell" $cell -}}
{{- $model := dict -}}
{{- with $v.model.path }}{{- $_ := set $model "path" . }}{{- end -}}
{{- with $v.model.name }}{{- $_ := set $model "name" . }}{{- end -}}
{{- with $model }}{{- $_ := set $config "model" . }}{{- end -}}
{{- with $v.config.engine }}{{- $_ := set $config "engine" . }}{{- end -}}
{{- with $v.config.server }}{{- $_ := set $config "server" . }}{{- end -}}
{{- with $v.config.log }}{{- $_ := set $config "log" . }}{{- end -}}
{{- $_ := set $config "ray" (dict "attention_resource" "shoal_attention" "expert_resource" "shoal_expert") -}}
{{- toYaml $config -}}
{{- end -}}

{{/* What KubeRay hands to Ray Serve; how many replicas, and where, is in the application's own config. */}}
{{- define "shoal.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
grpc_options:
  port: 9000
  grpc_servicer_functions:
    - deploy.gateway.grpc_servicer.add_cancelling_servicer
    - grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server
applications:
  - name: shoal
    route_prefix: /
    import_path: deploy.app:build
    args:
      config: /etc/shoal/shoal.yaml
{{- end -}}
