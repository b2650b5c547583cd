{{/* Rules between values, which a schema cannot tell; the program's own, in its words, before a pod has to find out. */}}
{{- define "shoal.rules" -}}
{{- $v := .Values -}}
{{- $engine := $v.config.engine | default dict -}}
{{- if and (hasKey $engine "kv_cache_tokens") (hasKey $engine "kv_cache_memory_gb") -}}
{{- fail (printf "config: engine.kv_cache_tokens (%v) and engine.kv_cache_memory_gb (%v) say the same thing twice; keep one" $engine.kv_cache_tokens $engine.kv_cache_memory_gb) -}}
{{- end -}}
{{/* Defaults of the program (deploy/config.py), as is the drain below. */}}
{{- $seqs := $engine.max_num_seqs | default 64 -}}
{{- $tokens := $engine.max_num_batched_tokens | default 512 -}}
{{- if gt (int64 $seqs) (int64 $tokens) -}}
{{- fail (printf "config: engine.max_num_seqs (%v) must not exceed engine.max_num_batched_tokens (%v): every running sequence decodes in a step" $seqs $tokens) -}}
{{- end -}}
{{- $name := $v.model.name | default (base $v.model.path) -}}
{{- if regexMatch "[\\p{C}\\p{Z}]" $name -}}
{{- $remedy := ternary "" " (the directory's name): set model.name" (ne $v.model.name "") -}}
{{- fail (printf "model.name must have no spaces or control characters, got '%s'%s" (printf "%q" $name | trimAll "\"") $remedy) -}}
{{- end -}}
{{- $drain := ($v.config.server | default dict).drain_timeout_s | default 30 -}}
{{- $stop := $v.termination -}}
{{- if ge (addf $stop.preStopSleepSeconds $drain) (float64 $stop.gracePeriodSeconds) -}}
{{- fail (printf "termination.gracePeriodSeconds (%v) must exceed termination.preStopSleepSeconds (%v) and config.server.drain_timeout_s (%v) together: a pod would be killed with its requests running" $stop.gracePeriodSeconds $stop.preStopSleepSeconds $drain) -}}
{{- end -}}
{{- end -}}
