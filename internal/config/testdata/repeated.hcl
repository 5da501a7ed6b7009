plugins {
  NodeAttestor "one" { plugin_data {} }
  NodeAttestor "two" {
    plugin_data {}
  }
}
